# IXI, for prepare.py: T1w, T2w and PD heads of about 580 adults from brain-development.org, extracted into
# whatever folders. Give --root, --people (its spreadsheet as .csv) and --skullstrip.
source = 'pattern'
pattern = r'**/{subject:IXI\d+}-*-*-{modality:T1|T2|PD}.nii*'
out_dir = 'data/ixi'
modalities = ('T1w', 'T2w', 'PD')
columns = ('IXI_ID', 'SEX_ID (1=m, 2=f)', 'AGE')
sex_codes = ('1=M', '2=F')
register = True
