# Row "+ M-FiLM" of NeuroQuant table 2: attention and the modality-FiLM decoder, no auxiliary losses.
out_dir = 'out/ablation_film'
w_cross = 0.0
w_adv = 0.0
