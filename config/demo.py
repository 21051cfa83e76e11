# NeuroQuant on phantoms at 32x48x32: minutes on two CPU cores, no GPU, no data of yours.
data_dir = 'data/demo'
prepare = '--source=phantom --n=120 --shape=32,48,32 --modalities=T1w,T2w'
out_dir = 'out/demo'

widths = (16, 32, 48, 64)
anat_dim = 32
mod_dim = 2              # 32 bits of style beside 12 tokens of 8 bits
modality_dim = 16
num_codes = 256

w_ssim = 0.1             # so little is known of a brain here that blur scores best; the paper's runs use 0.5
batch_size = 1           # with two cores, steps help more than batch
iters_3d = 800
joint = 'none'
lr = 1e-3
min_lr = 1e-5
beta2 = 0.99
warmup_iters = 20
lr_decay_iters = 800
cross_start, cross_ramp = 500, 50
adv_start = 500
ema_decay = 0.99
eval_interval = 400
log_interval = 50
