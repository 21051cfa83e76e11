# NeuroQuant without joint training: row "w/o joint training" of its table 1, at equal steps. It is a control
# of 125k steps on volumes alone. After 100k steps, ckpt_3d.pt of config/neuroquant.py is the same.
out_dir = 'out/neuroquant_3d_only'
joint = 'none'
iters_3d = 125_000
lr_decay_iters = 100_000  # as in the full run: the last 25k steps at min_lr
