# NeuroQuant, the full model: tables 1 and 2, row "NeuroQuant (ours)" / "+ L_adv (full)". Narrow reading of the paper (only C4 = 256
# is stated). 100k steps on volumes, then 25k on slices. out_dir/ckpt_3d.pt, saved between the two, is row "w/o joint training".
out_dir = 'out/neuroquant'
modalities = ('T1w', 'T2w')
widths = (32, 64, 128, 256)
num_codes = 4096

batch_size = 4           # sessions, both modalities of each; over all processes together 4 x processes
iters_3d = 100_000
lr = 1e-4
min_lr = 4.5e-6
lr_decay_iters = 100_000

joint = 'sequential'
batch_size_2d = 128
iters_2d = 25_000        # at min_lr
