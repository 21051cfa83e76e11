# VQGAN as a baseline of NeuroQuant table 1: 2D, 8x, axial slices, 16384 codes of 4 channels.
# A 144x192x144 volume takes 870,912 bits. It is trained from scratch on the same data; the paper does not
# say whether its rows were.
kind = 'convvae'
out_dir = 'out/vqgan'
dims = 2
layout = 'sd'
widths = (128, 256, 256, 512)
res_blocks = 2
bottleneck = 'vq'
latent_dim = 4
num_codes = 16384

batch_size = 16          # slices
iters = 100_000
lr = 1e-4
min_lr = 4.5e-6
warmup_iters = 1000
lr_decay_iters = 100_000
beta1, beta2 = 0.5, 0.9

w_ssim = 0.0
w_commit = 0.25
w_perc = 0.3             # needs --perc_trunk and --perc_lin, or --perceptual=random, or --w_perc=0
w_discriminator = 0.1
discriminator_dims = (2,)
discriminator_start = 10_000
