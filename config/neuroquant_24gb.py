# NeuroQuant on a 24 GB card: the optimisation of config/neuroquant.py, in two micro-steps of 2 sessions each.
out_dir = 'out/neuroquant'
batch_size = 2
grad_accum = 2           # 2 sessions x 2 = 4 per step
checkpointing = True     # the backward pass computes the half- and full-size stages again
batch_size_2d = 128
