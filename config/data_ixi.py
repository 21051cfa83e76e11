# IXI, for prepare.py: T1w, T2w and PD heads of about 580 adults from brain-development.org. Give --root, --people (its spreadsheet as .csv) and --skullstrip.
source = 'ixi'
out_dir = 'data/ixi'
modalities = ('T1w', 'T2w', 'PD')
columns = ('IXI_ID', 'SEX_ID (1=m, 2=f)', 'AGE')
sex_codes = ('1=M', '2=F')
register = True
