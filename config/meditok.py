# A tokeniser like MediTok as a baseline of NeuroQuant table 1: 2D, 16x, axial slices, 8 codebooks of 4096
# that split the channels. A 144x192x144 volume takes 1,492,992 bits. MediTok itself is a transformer trained
# on 30 M images: this is its rate, not its network.
kind = 'convvae'
out_dir = 'out/meditok'
dims = 2
layout = 'sd'
widths = (64, 128, 256, 256, 512)
res_blocks = 2
bottleneck = 'vq'
latent_dim = 64
num_codes = 4096
num_codebooks = 8
codebooks = 'split'

batch_size = 16          # slices
iters = 100_000
lr = 1e-4
min_lr = 4.5e-6
warmup_iters = 1000
lr_decay_iters = 100_000

w_ssim = 0.0
w_commit = 0.25
w_perc = 0.3             # needs --perc_trunk and --perc_lin, or --perceptual=random, or --w_perc=0
w_discriminator = 0.1
discriminator_dims = (2,)
discriminator_start = 10_000
