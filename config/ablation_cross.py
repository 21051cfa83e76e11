# Ablation ladder, table 2, row "+ L_cross"; the last rung, "+ L_adv (full)", is config/neuroquant.py.
out_dir = 'out/ablation_cross'
w_adv = 0.0
