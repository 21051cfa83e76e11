# A GPT on the twelve tokens of config/demo.py's autoencoder. It takes minutes on two CPU cores.
vae = 'out/demo/best.pt'
out_dir = 'out/demo_gpt'
layers = 3
heads = 4
width = 96
dropout = 0.2
conditions = ('sex', 'age')
batch_size = 16
iters = 700
lr = 1e-3
min_lr = 1e-5
warmup_iters = 50
ema_decay = 0.99
eval_interval = 100
log_interval = 100
