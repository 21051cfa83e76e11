# An autoencoder like MedVAE as a baseline of NeuroQuant table 1: 3D, 8x, one latent channel, KL.
# A 144x192x144 volume takes 124,416 bits, at 16 bits a number. It is trained from scratch on the same data.
kind = 'convvae'
out_dir = 'out/medvae'
widths = (64, 128, 256, 256)
res_blocks = 2
latent_dim = 1

batch_size = 2
patch = (96, 96, 96)
iters = 100_000
lr = 1e-4
min_lr = 4.5e-6
warmup_iters = 1000
lr_decay_iters = 100_000

w_ssim = 0.0
w_kl = 5e-4
w_perc = 0.3             # needs --perc_trunk and --perc_lin, or --perceptual=random, or --w_perc=0
w_discriminator = 0.1
discriminator_dims = (3,)
