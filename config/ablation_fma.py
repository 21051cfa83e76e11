# Row "+ FMA" of NeuroQuant table 2: the base model with factorised multi-axis attention.
out_dir = 'out/ablation_fma'
film = False
w_cross = 0.0
w_adv = 0.0
