# NeuroQuant, the full model: row "NeuroQuant (ours)" of its table 1, "+ L_adv (full)" of its table 2.
# The widths are a narrow reading of the paper, which states C4 = 256 alone. It trains 100k steps on volumes,
# then 25k on slices. Between the two it saves out_dir/ckpt_3d.pt. With --attn_levels=1,2,3,
# without attention at half of the size, a step moves 0.63 of the bytes (docs/speed.md); nothing lost at 4 mm.
out_dir = 'out/neuroquant'
modalities = ('T1w', 'T2w')
widths = (32, 64, 128, 256)
num_codes = 4096

batch_size = 4           # sessions per process, both modalities of each; 4 x processes in all
iters_3d = 100_000
lr = 1e-4
min_lr = 4.5e-6
lr_decay_iters = 100_000

joint = 'sequential'
batch_size_2d = 128
iters_2d = 25_000        # at min_lr
