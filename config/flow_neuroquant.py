# A flow on NeuroQuant's anatomy latent. Every new brain comes out in all of the model's modalities, aligned
# voxel by voxel. No table of the papers has this row.
vae = 'out/neuroquant/best.pt'
out_dir = 'out/flow_neuroquant'
widths = (128, 256, 512)  # the latent is 9x12x9
attention = (True, True, True)
batch_size = 16
iters = 100_000
normalise = 'channel'
