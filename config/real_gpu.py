# config/real.py on a GPU: a deeper network, sixteen larger patches at a time.
kind = 'convvae'
data_dir = 'data/ds002748'
out_dir = 'out/real_gpu'
modalities = ('T1w',)
layout = 'fold'
norm = 'none'
widths = (40, 80)
res_blocks = 2

batch_size = 16
patch = (64, 64, 64)
brain_patches = 0.9
iters = 2000
muon = True
lr = 2e-3
min_lr = 2e-5
beta2 = 0.99
warmup_iters = 100
lr_decay_iters = 2000
ema_decay = 0.999
eval_interval = 1000
eval_sessions = 2
log_interval = 50

w_ssim = 0.0
w_kl = 1e-5
