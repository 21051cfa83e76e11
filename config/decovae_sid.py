# DeCo-VAE with the scale-invariant regulariser: rows "SID" of its table 1, "L_SID" of table 4.
# Tables 2 and 3 print it after fine-tuning: config/decovae_sid_dft.py.
# Data: prepare.py --shape=128,256,128 --resize=True --percentiles=0,99.5 --percentiles_of=volume.
# Only out_dir and the last line differ from config/maisi.py.
kind = 'convvae'
out_dir = 'out/decovae_sid'
modalities = ('T1w',)
widths = (64, 128, 256)  # 20,944,897 parameters, latent 4x32x64x32
res_blocks = 2

batch_size = 2           # per GPU; the paper has eight
patch = (96, 96, 96)
iters = 100_000
lr = 1e-4
min_lr = 0.0
warmup_iters = 0
lr_decay_iters = 100_000
weight_decay = 1e-5
ema_decay = 0.0

w_ssim = 0.0
w_kl = 5e-4              # mean over elements; MAISI's own 1e-7 on the sum is 5.5e-3 here
w_perc = 0.3             # needs --perc_trunk and --perc_lin, or --perceptual=random, or --w_perc=0
w_discriminator = 0.1

w_sid = 10.0             # lambda_DeCo of eq. 7
