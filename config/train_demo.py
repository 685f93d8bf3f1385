# A GPT small enough for `make demo` on a CPU: about three minutes on two cores, from a loss of 10.8 to under 5.

out_dir = "out-demo"
eval_interval = 100
eval_iters = 1
log_interval = 20

dataset = "demo"
gradient_accumulation_steps = 1
batch_size = 8
block_size = 128  # 1,024 tokens per iteration: with so few in all, many small steps teach more than few large ones

n_layer = 4
n_head = 4
n_embd = 64

learning_rate = 6e-3  # small models bear large steps
max_iters = 1000
warmup_iters = 20
lr_decay_iters = 1000
min_lr = 3e-4
beta2 = 0.99
