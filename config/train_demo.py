# A GPT small enough for `make demo` on a CPU: about four minutes on two cores, from a loss of 10.8 to under 5.

out_dir = "out-demo"
eval_interval = 200
eval_iters = 1
log_interval = 40

dataset = "demo"
gradient_accumulation_steps = 1
batch_size = 8
block_size = 64  # 512 tokens per iteration: with so few in all, many small steps teach more than few large ones

n_layer = 4
n_head = 4
n_embd = 64

learning_rate = 4e-3  # small models bear large steps
max_iters = 1200
warmup_iters = 40
lr_decay_iters = 1200
min_lr = 4e-4
beta2 = 0.99

compile = False  # it would gain nothing at this size, and take a minute
