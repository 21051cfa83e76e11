# BIDS derivatives with brain masks beside the scans, as fMRIPrep makes of ABCD, for prepare.py. Give --root.
source = 'bids'
entities = ('space-MNI152NLin2009cAsym', 'desc-preproc')
mask = '{subject}_*space-MNI152NLin2009cAsym*desc-brain_mask.nii.gz'
out_dir = 'data/abcd'
