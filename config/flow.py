# DeCo-VAE's latent flow: the gFID columns of its tables 3 to 5, one run per autoencoder (give --vae and --out_dir for the others).
# Decoders fine-tuned on the same encoder share this flow: sample.py --mode=generate --vae=out/decovae_vad_dft/ckpt.pt.
vae = 'out/decovae_vad/ckpt.pt'
out_dir = 'out/flow_vad'
widths = (64, 128, 256, 512)
batch_size = 4           # in all; with N processes, 4 / N each
iters = 100_000
lr = 1e-4
