# NeuroQuant on phantoms of 32x48x32 voxels. It takes minutes on two CPU cores and needs no data.
data_dir = 'data/demo'
prepare = '--source=phantom --n=120 --shape=32,48,32 --modalities=T1w,T2w'
out_dir = 'out/demo'

fold = True              # begins and ends on blocks of voxels: full-size layers would take half of the time
norm = 'none'            # instance norms tell T1w from T2w before the codebook does
widths = (16, 32, 48, 64)
attn_levels = (2, 3)     # at 1/8 and 1/16 only: attention at 1/2 and 1/4 would take a third of the time
anat_dim = 32
mod_dim = 2              # 32 bits of style beside 12 tokens of 8 bits
modality_dim = 16
num_codes = 256

# Twelve tokens leave much unknown: squared error, which PSNR measures, learns faster here than L1 + SSIM.
recon = 'l2'
w_ssim = 0.0
w_commit = 0.025
batch_size = 2
iters_3d = 900
joint = 'none'
muon = True
lr = 3e-3
min_lr = 1e-5
beta2 = 0.99
warmup_iters = 20
lr_decay_iters = 900
w_align = 0.001          # T1w and T2w of a session share two thirds of their tokens, without it a third
cross_start = 450
cross_ramp = 50
adv_start = 450
ema_decay = 0.99
eval_interval = 450
log_interval = 50
