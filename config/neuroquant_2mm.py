# A small NeuroQuant of T1w and T2w at 2 mm: 150 tokens a brain. One CPU thread trains it in an hour.
# Data: prepare.py --source=labelmaps --root=labelmaps --n=140 --spacing_mm=2 --shape=80,96,80
#   --modalities=T1w,T2w --dtype=uint8 --split=0.8,0.2,0
data_dir = 'data/labelmaps_2mm'
out_dir = 'out/neuroquant_2mm'
synthesise = 0.5         # half of the contrasts are drawn anew at every step

fold = True              # the full-size layers would take most of the time
norm = 'none'            # instance norms tell T1w from T2w before the codebook does
quantizer = 'fsq'        # finite scalars use more codes than a codebook after so few steps
widths = (16, 32, 48, 64)
attn_levels = (2, 3)
anat_dim = 32
mod_dim = 4
modality_dim = 16
num_codes = 512

recon = 'l2'
w_ssim = 0.0
w_commit = 0.025
batch_size = 1
iters_3d = 2000
joint = 'none'
muon = True
lr = 3e-3
min_lr = 1e-5
beta2 = 0.99
warmup_iters = 50
lr_decay_iters = 2000
w_cross = 0.1            # with 0.5, from step 600 of 1200 on, reconstructions stood still
cross_start = 1000
cross_ramp = 200
adv_start = 1000
ema_decay = 0.99
eval_interval = 500
log_interval = 25
