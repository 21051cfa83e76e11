# HCP young adult, for prepare.py: T1w and T2w brains at 0.7 mm, aligned, from its structural packages.
# Give --root and --people (its unrestricted .csv, ages in bands).
source = 'pattern'
pattern = '{subject}/T1w/{modality}_acpc_dc_restore_brain.nii.gz'
out_dir = 'data/hcp'
modalities = ('T1w', 'T2w')
columns = ('Subject', 'Gender', 'Age')
