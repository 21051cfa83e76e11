# Ablation ladder, table 2, row "+ M-FiLM": attention and the modality-FiLM decoder, no auxiliary losses.
out_dir = 'out/ablation_film'
w_cross = 0.0
w_adv = 0.0
