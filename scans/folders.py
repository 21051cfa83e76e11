"""Folders of scans with names of any kind: whose scan is it, of which visit and modality?

Names as cohorts are downloaded are known (KNOWN). Of others, the words of a path are sorted into modality,
visit, descriptions and the rest, which names the subject.
"""
import hashlib
import os
import re
import unicodedata
from collections import Counter, defaultdict

from scans.files import SUFFIXES, add_scan, clean, every_scan, stem

# other words for modalities, in names of files that follow no rule
WORDS = SUFFIXES | dict.fromkeys(('t1n', 'mpr', 'spgr', 'fspgr', 'bravo'), 'T1w') | {'t2f': 'FLAIR'}
CONTRAST_AGENT = set('t1ce t1c t1gd t1post t1km t1wce t1wc gd gado postgad postcontrast'.split())
NO_SCAN = set('''mask seg dseg label labels aseg aparc wmparc ribbon probseg brainmask warp xfm pve
    segmentation lesion lesions roi'''.split())
# what describes a scan, and names no subject
DESCRIPTIONS = set('''brain bet stripped skullstripped masked n4 bias biascorr reg registered coreg
    coregistered mni mni152 norm normalized preproc preprocessed defaced raw orig original restore acpc dc
    corrected resampled iso nii gz anat mri mr ax axial sag sagittal cor coronal 3d 2d pre native img image
    scan volume final nifti niftis be tfl ir se tse fse weighted head contrast precontrast'''.split())
PHASES = {'pre', 'post', 'preop', 'postop'}  # visits before a word for a modality
DROPPED = set(WORDS) | CONTRAST_AGENT | NO_SCAN | DESCRIPTIONS | PHASES
# the image that a scan was registered to, as in T1_to_FLAIR and T1_reg_T2; 01_reg_T1 and 01_on_T1 are T1s
REGISTERED, TARGET = '(?:co)?reg(?:istered)?', '[-_ ]?(?:t1[a-z]*|t2w?|flair|pdw?|mni[a-z0-9]*)(?![a-z0-9])'
REGISTERED_TO = re.compile(
    rf'(?i)[-_ ](?:{REGISTERED}[-_ ]?)?to{TARGET}|'
    rf'((?<![a-z0-9])(?:t1w?|t2w?|flair|pdw?|mp[-_ ]?rage)(?![a-z0-9]).*?)'
    rf'[-_ ](?:{REGISTERED}(?:[-_ ]?on)?|in|on|space){TARGET}')
# folders that hold more than one subject, or only a part of one
GENERIC = re.compile(
    r'(train|training|val|valid|validation|test|testing|data|dataset|images?|imagestr|imagests|labels?|anat|'
    r'niftis?|nii|mri|hgg|lgg|raw|processed|derivatives|sourcedata|scans?|fold|batch|part|site|cent(er|re)|'
    r'group|cohort|release|series|study|set|subjects?|patients?|unprocessed|structural|freesurfer|orig|'
    r'brains?|heads?|adni|oasis|brats|ixi|abide)[-_ ]?\d*', re.IGNORECASE)
SITE = re.compile(r'(site|cent(er|re)|hospital|scanner|group|cohort|study|batch)[-_ ]?\d*', re.IGNORECASE)
DATE = re.compile(r'(?<!\d)((?:19|20)\d\d([-._]?)(?:0\d|1[0-2])\2(?:[0-2]\d|3[01]))'
                  r'(?:\d{6,9}|[T_]\d\d[_:.]\d\d[_:.]\d\d(?:\.\d+)?)?(?!\d)')
VISIT = re.compile(
    r'(?<![A-Za-z0-9])(?:ses-[a-z0-9]+|'
    r'(?:ses|session|visit|time|timepoint|tp|scan|followup|fu|baseline|bl|screening|wave|'
    r'year|month|week|day)[-_ ]?\d+[a-z]?|baseline|bl|screening|followup|'
    # 6m, 12mo, 1 year; but 01M may tell a sex, and of 001_week_2 the week is the visit
    r'(?-i:\d{1,2}[my])|\d{1,3}[-_ ]?(?:mo|months?|yrs?|years?|wks?|weeks?)(?![-_ ]?\d))(?![A-Za-z0-9])',
    re.IGNORECASE)
SHORT_VISIT = re.compile(r'(?:v|m|y|w|d|wk|yr|mo|mr|t|s)\d{1,3}|\d{1,2}[my]', re.IGNORECASE)
KEYS = re.compile(
    r'(?:^|(?<=_))(?:run|acq|rec|desc|space|res|echo|inv|part|ce|chunk|dir|label)-[A-Za-z0-9]+')
KNOWN = [re.compile(pattern) for pattern in (  # subject, and visit where the name has one
    r'(?:^|(?<=[/_]))(?P<subject>sub-[A-Za-z0-9]+)',
    r'(?<!\d)(?P<subject>\d{3}_S_\d{4,5})(?!\d)',                # ADNI
    r'(?P<subject>OAS\d_?\d{4,5})(?:_MR_?(?P<session>d?\d+))?',  # OASIS
    r'(?P<subject>BraTS-[A-Za-z]+-\d{5})-(?P<session>\d{3})',    # BraTS from 2023 on
    r'(?P<subject>UPENN-GBM-\d{5})_(?P<session>\d\d)',
    r'(?P<subject>TCGA-\w{2}-\w{4})',
    r'(?P<subject>IXI\d{3})(?=-)')]
LONGITUDINAL = re.compile(r'(?P<visit>.+)\.long\.(?P<base>.+)')  # FreeSurfer's folder of a visit
BASE = re.compile('[-_.](?:base|template)$')  # of a person's template, as many name it

# ---------------------------------------------------------------- the words of a name

class Name:
    """What the words of a folder's or file's name say: id, visit, modalities, whether it is a plain scan."""
    def __init__(self, text):
        self.text = text
        date = DATE.search(text)
        plain = re.sub(r'(?i)mp[-_ ]?rage', 'mprage', REGISTERED_TO.sub(r'\1', text))
        rest = DATE.sub('_', KEYS.sub('_', plain))
        visit = VISIT.search(rest)
        self.visit = ''
        if date or visit:
            self.visit = date[1] if date else visit[0]
        words = list(re.finditer(r'[^-_. ]+', VISIT.sub('_', rest)))
        small = [word[0].lower() for word in words]
        self.modalities = [WORDS[word] for word in small if word in WORDS]
        self.no_scan = any(word in NO_SCAN for word in small)
        self.agent = any(word in CONTRAST_AGENT for word in small)
        self.read_phases(small)
        first = next((k for k, word in enumerate(small) if word not in DROPPED), len(small))
        last = next((k for k in range(first, len(small)) if small[k] in DROPPED), len(small))
        run = words[first:last]  # the first words in a row that are left
        if len(run) > 1 and SHORT_VISIT.fullmatch(run[-1][0]) and not run[-2][0].isalpha():
            of_site = len(run) == 2 and SITE.fullmatch(run[0][0])
            if not of_site:  # Site1_S01 is a person
                self.visit = self.visit or run.pop()[0]
        self.id = VISIT.sub('_', rest)[run[0].start():run[-1].end()] if run else ''
        self.numbered = any(c.isdigit() for c in self.id)

    def read_phases(self, words):
        """Tell pre and post as visits (pre_T1, post/T1) from before and after contrast (T1_pre, T1_post)."""
        kinds = [WORDS.get(word, '') for word in words]
        after_t1 = words[kinds.index('T1w') + 1:] if 'T1w' in kinds else []
        without = {'pre', 'no', 'non', 'without'} & set(words)
        if 'post' in after_t1 or 'contrast' in words and 'T1w' in kinds and not without:
            self.agent = True
        modality = next((k for k, kind in enumerate(kinds) if kind), len(words))
        phases = [word for word in words[:modality] if word in PHASES]
        if phases and 'contrast' not in words:
            self.visit = self.visit or phases[0]

    def modality(self):
        """The one of its modalities that counts; '' without any."""
        if 'FLAIR' in self.modalities: return 'FLAIR'
        if set(self.modalities) == {'T1w', 'PD'}:
            return 'T1w'  # of a patient with Parkinson's disease
        return self.modalities[-1] if self.modalities else ''

    def skeleton(self):
        """The id with # for its digits; '' where it has too few of them to number persons."""
        return re.sub(r'\d', '#', self.id) if len(re.findall(r'\d', self.id)) >= 2 else ''

def relative_to(root, path):
    return os.path.relpath(path, root).replace(os.sep, '/')

def known_name(text):
    """The match of the first of KNOWN that a path or name holds, or None."""
    return next(filter(None, (regex.search(text) for regex in KNOWN)), None)

class Longitudinal:
    """The folders of FreeSurfer's longitudinal stream among paths: VISIT, VISIT.long.BASE and BASE.

    read_as: {folder: PERSON/ses-X, or the visit's own name where that tells the person}.
    """
    def __init__(self, paths, root):
        self.root, self.bases, self.read_as = root, set(), {}
        for path in paths:
            for folder in relative_to(root, path).split('/')[:-1]:
                match = LONGITUDINAL.fullmatch(folder)
                if match:
                    self.bases.add(match['base'])
                    self.read_as[folder] = self.read_as[match['visit']] = self.visit_of(**match.groupdict())

    def visit_of(self, visit, base):
        """How the name of a visit's folder is read, so that it is one of its base's person."""
        person, known = BASE.sub('', base), known_name(visit)
        if (known['subject'] if known else Name(visit).id) == person: return visit
        label = re.sub('[^A-Za-z0-9]', '', visit.removeprefix(person))
        return f"{person}/ses-{label or '01'}"

    def is_template(self, path):
        """Whether a path is of a person's template, which is an average and no scan of a visit."""
        folders = ['', *relative_to(self.root, path).split('/')[:-1]]
        if 'mri' not in folders: return folders[-1] in self.bases
        folder = folders[folders.index('mri') - 1]
        is_base = folder in self.bases or BASE.search(folder)
        return bool(is_base) and folder not in self.read_as

class Found:
    """A file below root, and what its path says. read_as: of Longitudinal, how names of folders are read."""
    def __init__(self, path, root, read_as=None):
        self.path = path
        self.relative = relative_to(root, path)
        folders = [(read_as or {}).get(name, name) for name in self.relative.split('/')[:-1]]
        self.read = '/'.join([*folders, os.path.basename(path)])
        *folders, file = map(Name, stem(self.read).split('/'))
        self.file, self.folders = file, folders
        self.known = known_name(self.read)
        named = [name for name in (file, *reversed(folders)) if name.modalities]
        self.modality = named[0].modality() if named else ''
        self.home = self.subject = ''
        self.short, self.short_is_person = self.short_folder(), False

    def reason(self):
        """Why it is no plain scan of a modality, else ''."""
        if self.file.no_scan: return 'a mask or label map by its name'
        if self.file.agent or any(name.agent for name in self.folders):
            return 'after a contrast agent by its name; give a --pattern to use it'
        return '' if self.modality else 'subject and modality cannot be told from the name'

    def able_folders(self):
        """The indices of the folders that may name a subject or a visit."""
        return [k for k, name in enumerate(self.folders) if name.id and not GENERIC.fullmatch(name.text)]

    def short_folder(self):
        """The index of a folder that may be a person or a visit, as in AD/S01 and anna/s1; or -1."""
        able = self.able_folders()
        long = [k for k in able if not SHORT_VISIT.fullmatch(self.folders[k].id)]
        if self.known or self.file.numbered or not long: return -1
        if any(self.folders[k].numbered for k in long): return -1
        return next((k for k in able if k > long[0] and k not in long), -1)

    def folder_of_subject(self):
        """The index of the deepest folder that may name a subject, with a number if any has one; or -1."""
        if self.short_is_person: return self.short
        able = self.able_folders()
        long = [k for k in able if not SHORT_VISIT.fullmatch(self.folders[k].id)] or able[:1]
        plain = [k for k in long if not self.folders[k].modalities] or long
        numbered = [k for k in plain if self.folders[k].numbered]
        return (numbered or plain or [-1])[-1]

    def assign(self, by_file):
        """Choose the subject: by a known name, else by the file's or by a folder's."""
        k = self.folder_of_subject()
        folder = self.folders[k].id if k >= 0 else ''
        by_folder = folder and not by_file and (self.folders[k].numbered or not self.file.numbered)
        if self.known:
            self.subject, self.home = self.known['subject'], ''
        elif by_folder or not self.file.id:
            self.subject, self.home = folder, '/'.join(name.text for name in self.folders[:k])
        else:
            self.subject = self.file.id
            self.home = '/'.join(name.text for name in self.folders if not name.modalities)
            if self.home.rpartition('/')[2] == self.subject:
                self.home = self.home.rpartition('/')[0]
        if not self.subject:  # a number that only looks like a date
            dates = [name.visit for name in (self.file, *reversed(self.folders)) if name.visit]
            self.subject = dates[0] if dates else ''

    def visit(self):
        """The visit that the path names, as a session; ses-01 where it names none."""
        match = re.search(r'(?:^|[/_])(ses-[A-Za-z0-9]+)', self.read)
        if match: return match[1]
        if self.known and self.known.groupdict().get('session'):
            return f"ses-{self.known['session']}"
        names = [*reversed(self.folders), self.file]
        visits = [name.visit for name in names if name.visit]
        below = self.folders[self.folder_of_subject() + 1:]
        visits += [name.id for name in below if SHORT_VISIT.fullmatch(name.id)]  # 001/m12/t1.nii
        return 'ses-' + re.sub(r'[^A-Za-z0-9]', '', visits[0]) if visits else 'ses-01'

# ---------------------------------------------------------------- the folder

TEMPLATE = "of FreeSurfer's template (base) of a person, no visit; if it is a visit, rename its folder"

def find_folder(root, notes, doubts=None):
    """Every scan below root with subject and modality in its path.

    Such as 01_T1w.nii.gz, 01/t1.nii, train/01/2019-03-04/t1.nii. Where names allow two groupings, the one
    without two files for one scan is taken, and doubts show it.
    """
    files, every_path = [], every_scan(root, notes)
    longitudinal = Longitudinal(every_path, root)
    for path in every_path:
        file = Found(path, root, longitudinal.read_as)
        if longitudinal.is_template(path):
            notes.append(f'{path}: {TEMPLATE}')
        elif file.reason():
            notes.append(f'{path}: {file.reason()}')
        else:
            files.append(file)
    mark_persons(files)
    by_file = better_by_file(files)
    for file in files:
        file.assign(by_file)
    doubtful = tell_apart(files)
    sessions, paths, doubts = defaultdict(dict), defaultdict(list), [] if doubts is None else doubts
    names = names_of({file.subject for file in files}, doubts)
    for file in files:
        try:
            subject = clean('subject', names[file.subject], file.path)
        except SystemExit as e:
            notes.append(str(e))
            continue
        add_scan(sessions, subject, file.visit(), file.modality, file.path, notes)
        if file.subject in doubtful or by_file == 'guess' or file.short >= 0:
            paths[subject].append(file.relative)
    if paths:
        doubts += [f"{subject} <- {', '.join(taken)}" for subject, taken in paths.items()]
        doubts.append(f'where this is wrong: --source=pattern --pattern={suggested(files[0])}')
    return sessions, {}

def name_of(subject):
    """A subject's id with the letters alone that a name may have: Muller for Müller."""
    letters = unicodedata.normalize('NFKD', subject)
    plain = ''.join(letter for letter in letters if not unicodedata.combining(letter))
    return re.sub('^sub_', '', re.sub(r'[^A-Za-z0-9_.+-]+', '-', plain).strip('-_.'))

def same_id(subject):
    """An id without what one person's may differ in: sub_ before it, signs around it, composed letters."""
    return re.sub('^sub_', '', unicodedata.normalize('NFC', subject).strip('-_. '))

def names_of(subjects, doubts):
    """{id: name}, another one for each person.

    Ids that would share a name, or have none, get a hash of the id, and doubts name them. An id that is a
    name already keeps it.
    """
    ids_of, names = defaultdict(list), {}
    for subject in sorted(subjects):
        ids_of[name_of(subject)].append(subject)
    for name, ids in ids_of.items():
        unclear = len(set(map(same_id, ids))) > 1 or not name and any(map(same_id, ids))
        for subject in ids:
            names[subject] = name
            if unclear and same_id(subject) != name:
                digest = hashlib.sha256(same_id(subject).encode('utf-8', 'surrogateescape')).hexdigest()
                names[subject] = f'{name}-{digest[:6]}'.strip('-')
        if unclear:
            kept = ', '.join(f'sub-{names[subject]} <- {subject}' for subject in ids)
            doubts.append(f'{kept}: the letters that a name may have do not tell these; each now counts as '
                          'a person; rename what is one person')
    return names

def collisions(files):
    """How many files want a slot, a modality of a session, that another one has."""
    slots = Counter((file.subject, file.visit(), file.modality) for file in files)
    return sum(slots.values()) - len(slots)

def mark_persons(files):
    """Take folders such as S01 for persons where the folders above are groups: few, with many in each.

    They are visits where numbered persons have such visits.
    """
    words, visits = defaultdict(set), set()
    for file in files:
        if file.short >= 0:
            above = '/'.join(name.text for name in file.folders[:file.short])
            words[above].add('ses-' + file.folders[file.short].text)
        elif any(name.numbered for name in file.folders[:file.folder_of_subject() + 1]):
            visits.add(file.visit())
    many = sum(map(len, words.values())) >= len(words) ** 2
    persons = many and visits.isdisjoint(set().union(*words.values()))
    for file in files:
        file.short_is_person = persons and file.short >= 0

def better_by_file(files):
    """Whether the files' own names tell subjects better than folders: 'yes', 'guess' or ''.

    Yes where folders bring more files into one slot; a guess where a folder holds numbered names of one form,
    as of persons: study2/P001_T1.nii beside study2/P002_T2.nii.
    """
    counts = []
    for by_file in ('', 'yes'):
        for file in files:
            file.assign(by_file)
        counts.append(collisions(files))
    if counts[1] < counts[0]: return 'yes'
    ids = defaultdict(set)
    for file in files:
        k = file.folder_of_subject()
        if not file.known and k >= 0 and file.file.skeleton() and file.folders[k].id not in file.file.id:
            ids[os.path.dirname(file.path), file.file.skeleton()].add(file.file.id)
    return 'guess' if any(len(names) > 1 for names in ids.values()) and counts[1] <= counts[0] else ''

def tell_apart(files):
    """Rename subjects of one name in several folders where their scans collide: train/001 and val/001.

    Returns the subjects in doubt: those, or the ones that are taken from several folders.
    """
    homes, slots = defaultdict(set), defaultdict(set)
    for file in files:
        homes[file.subject].add(file.home)
        slots[file.subject, file.visit(), file.modality].add(file.home)
    shared = {subject for subject, folders in homes.items() if len(folders) > 1}
    if all(len(folders) == 1 for folders in slots.values()): return shared
    renamed = set()
    for file in files:
        if file.subject in shared:
            file.subject = f'{file.home}-{file.subject}'.replace('/', '-').strip('-')
            renamed.add(file.subject)
    return renamed

def suggested(file):
    """A pattern for paths like this file's."""
    pattern = file.relative.replace(file.subject, '{subject}')
    for word in re.findall(r'[A-Za-z0-9]+', os.path.basename(file.relative)):
        if word.lower() in WORDS:
            folder, _, name = pattern.rpartition('/')
            pattern = f'{folder}/{name.replace(word, "{modality}", 1)}'.lstrip('/')
            break
    return pattern if '{subject}' in pattern else '{subject}/*{modality}.nii.gz'
