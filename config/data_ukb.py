# UK Biobank's bulk field 20252, for prepare.py: T1w brains in MNI space, read out of the zip archives.
# Give --root and --people.
source = 'ukb'
out_dir = 'data/ukb'
columns = ('eid', '31-0.0', '21003-2.0')
sex_codes = ('0=F', '1=M')
dtype = 'float16'
