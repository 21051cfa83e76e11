# Row "Base model" of NeuroQuant table 2: a plain 3D VQ-VAE.
# It has no attention, no modality stream and no auxiliary losses.
out_dir = 'out/ablation_base'
attention = False
film = False
w_cross = 0.0
w_adv = 0.0
