# NeuroQuant on phantoms at 32x48x32: minutes on two CPU cores, no GPU, no data of yours.
data_dir = 'data/demo'
prepare = '--source=phantom --n=120 --shape=32,48,32 --modalities=T1w,T2w'
out_dir = 'out/demo'

widths = (16, 32, 48, 64)
anat_dim = 32
mod_dim = 4            # 64 bits of style beside 12 tokens of 8 bits
modality_dim = 16
num_codes = 256

batch_size = 4
iters_3d = 400
iters_2d = 0
joint = 'none'
lr = 2e-3
min_lr = 1e-4
warmup_iters = 20
lr_decay_iters = 400
cross_start, cross_ramp = 100, 100
adv_start = 100
ema_decay = 0.99
eval_interval = 100
