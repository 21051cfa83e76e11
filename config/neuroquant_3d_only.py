# NeuroQuant without joint training at equal steps: table 1, row "w/o joint training" as a 125k-step control of 3D steps alone.
# (The same row at 100k steps is ckpt_3d.pt of config/neuroquant.py.)
out_dir = 'out/neuroquant_3d_only'
joint = 'none'
iters_3d = 125_000
lr_decay_iters = 100_000  # as in the full run: the last 25k steps at min_lr
