# Ablation ladder, table 2, row "Base model": a plain 3D VQ-VAE, no attention, no modality stream, no auxiliary losses.
out_dir = 'out/ablation_base'
attention = False
film = False
w_cross = 0.0
w_adv = 0.0
