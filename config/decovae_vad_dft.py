# Decoder fine-tuning of out/decovae_vad: row "L_VAD + DFT" of DeCo-VAE tables 4 and 5, and "VAD" of its
# tables 2 and 3.
# The encoder stays as it is, bit for bit. The discriminators start anew.
# The perceptual weight is 200 times that of the first stage.
kind = 'convvae'
out_dir = 'out/decovae_vad_dft'
init_from = 'out/decovae_vad/ckpt.pt'
modalities = ('T1w',)
widths = (64, 128, 256)
res_blocks = 2
freeze_encoder = True

batch_size = 2
patch = (96, 96, 96)
iters = 10_000           # the paper; its released configs run 30,000
lr = 1e-5
min_lr = 0.0
warmup_iters = 0
lr_decay_iters = 10_000
weight_decay = 1e-5
ema_decay = 0.0

w_ssim = 0.0
w_perc = 60.0            # needs --perc_trunk and --perc_lin, or --perceptual=random
w_discriminator = 1.0
