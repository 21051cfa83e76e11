# SD-VAE as a baseline of NeuroQuant table 1: 2D, 8x, axial slices, 4 channels, KL. A 144x192x144 volume takes
# 3,981,312 bits, at 16 bits a number. It is trained from scratch on the same data;
# pretrained.load_sd_vae reads Stable Diffusion's own weights.
kind = 'convvae'
out_dir = 'out/sdvae'
dims = 2
layout = 'sd'
widths = (128, 256, 512, 512)
res_blocks = 2
latent_dim = 4

batch_size = 16          # slices
iters = 100_000
lr = 1e-4
min_lr = 4.5e-6
warmup_iters = 1000
lr_decay_iters = 100_000

w_ssim = 0.0
w_kl = 1e-6
kl_reduction = 'sum'
w_perc = 0.3             # needs --perc_trunk and --perc_lin, or --perceptual=random, or --w_perc=0
w_discriminator = 0.1
discriminator_dims = (2,)
discriminator_start = 10_000
