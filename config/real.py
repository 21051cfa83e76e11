# Our own KL autoencoder of real T1w brains at 1 mm: 4 channels at a quarter of the size, without norms.
# Data: prepare.py --source=bids --root=ds002748 --dtype=uint8 --split=0.7,0.1,0.2 (OpenNeuro, CC0).
kind = 'convvae'
data_dir = 'data/ds002748'
out_dir = 'out/real'
modalities = ('T1w',)
layout = 'fold'            # 1,079,144 parameters, which work on blocks of 2x2x2 voxels
norm = 'none'              # a patch is coded as that part of the volume
widths = (32, 64)
res_blocks = 1

batch_size = 2
patch = (32, 32, 32)
brain_patches = 0.9
iters = 8000
muon = True
lr = 2e-3
min_lr = 2e-5
beta2 = 0.99
warmup_iters = 100
lr_decay_iters = 8000
ema_decay = 0.999
eval_interval = 1000
eval_sessions = 2
log_interval = 500

w_ssim = 0.0
w_kl = 1e-4
