# A flow on the latents of config/demo_kl.py. It takes minutes on two CPU cores.
vae = 'out/demo_kl/best.pt'
out_dir = 'out/demo_flow'
widths = (32, 64, 128)
res_blocks = 1
attention = (False, False, True)
batch_size = 8
iters = 1000
muon = True
lr = 2e-3
warmup_iters = 50
ema_decay = 0.995
eval_interval = 500
sample_interval = 500
log_interval = 100
