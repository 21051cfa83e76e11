# A small DeCo-VAE (VAD) on phantoms of 32x48x32 voxels. It takes minutes on two CPU cores.
# --w_sid=0.1 --w_cov=0 --w_var=0 makes SID of it.
kind = 'convvae'
data_dir = 'data/demo'
prepare = '--source=phantom --n=120 --shape=32,48,32 --modalities=T1w,T2w'
out_dir = 'out/demo_kl'
modalities = ('T1w',)
layout = 'fold'            # as in real.py: blocks of voxels, no norms, orthogonal steps
norm = 'none'
widths = (32, 64)
res_blocks = 1
latent_dim = 8

batch_size = 2
patch = (24, 24, 24)
brain_patches = 0.9
iters = 2500
muon = True
lr = 4e-3
min_lr = 1e-5
beta2 = 0.99
warmup_iters = 20
lr_decay_iters = 2500
ema_decay = 0.99
eval_interval = 500
log_interval = 100

w_ssim = 0.0
w_kl = 1e-6
w_cov = 0.05             # without VAD, a flow on eight channels tears its brains
w_var = 0.05
