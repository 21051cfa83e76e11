# DeCo-VAE's latent flow: the gFID columns of its tables 3 to 5. Each autoencoder needs a run of its own:
# give --vae and --out_dir. A decoder fine-tuned on the same encoder shares this flow:
# sample.py --mode=generate --vae=out/decovae_vad_dft/ckpt.pt.
vae = 'out/decovae_vad/ckpt.pt'
out_dir = 'out/flow_vad'
widths = (64, 128, 256, 512)
batch_size = 4           # in all: with N processes give 4 / N
iters = 100_000
lr = 1e-4
