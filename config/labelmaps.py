# NeuroQuant on images made from real label maps, which this prepares:
# python prepare.py --source=labelmaps --root=MAPS --n=500 --out_dir=data/labelmaps
data_dir = 'data/labelmaps'
out_dir = 'out/labelmaps'
modalities = ('T1w', 'T2w', 'FLAIR')
batch_size = 2
