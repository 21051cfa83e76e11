# A GPT on NeuroQuant's 972 tokens: 30.5 M parameters. Every new brain comes out in all of the autoencoder's
# modalities, aligned voxel by voxel. No table of the papers has this row.
vae = 'out/neuroquant/best.pt'
out_dir = 'out/gpt'
layers = 9
heads = 8
width = 512
dropout = 0.1            # cohorts of thousands are small for it: best.pt is the step with the fewest held-out bits
batch_size = 16          # 15,552 tokens; in all: with N processes give 16 / N
iters = 20_000
lr = 6e-4
warmup_iters = 200
