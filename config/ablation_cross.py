# Row "+ L_cross" of NeuroQuant table 2: the full model without the adversarial loss.
# The last row, "+ L_adv (full)", is config/neuroquant.py.
out_dir = 'out/ablation_cross'
w_adv = 0.0
