# A tree of one folder per person and visit, as NCANDA's pipeline leaves, for prepare.py.
# Give --root and --people.
source = 'pattern'
pattern = '{subject}/standard/{session}/structural/stripped/{modality}.nii.gz'
out_dir = 'data/ncanda'
modalities = ('T1w', 'T2w')
