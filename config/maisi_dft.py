# Decoder fine-tuning of out/maisi: row "L_VAE + DFT" of DeCo-VAE table 4. Table 5 calls it "L_VAE".
# The encoder stays as it is, bit for bit. The discriminators start anew.
# The perceptual weight is 200 times that of the first stage.
kind = 'convvae'
out_dir = 'out/maisi_dft'
init_from = 'out/maisi/ckpt.pt'
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
