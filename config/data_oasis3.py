# OASIS-3, for prepare.py: heads as its BIDS download script leaves them.
# Give --root, --people (its demographics as .csv) and --skullstrip.
source = 'bids'
out_dir = 'data/oasis3'
columns = ('OASISID', 'GENDER', 'AgeatEntry')
sex_codes = ('1=M', '2=F')
register = True
