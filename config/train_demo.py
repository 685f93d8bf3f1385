# A GPT small enough for `make demo` on a CPU: in three minutes on two cores, the loss falls
# from 10.8 to about 4.3, and to about 4.8 on val.bin.

out_dir = "out-demo"
eval_interval = 200
eval_tokens = 16_384
log_interval = 20

dataset = "demo"
# With so few tokens in total, many small steps learn more than few large ones.
tokens_per_iter = 512
batch_size = 8
block_size = 64

n_layer = 4
n_head = 4
n_embd = 64

# Much like the short night, with the learning rates of its proxy (benchmarks/proxy.py).
architecture = "qwen3"
optimizer = "muon"
learning_rate = 0.02  # Muon, for the matrices of the blocks
embedding_lr = 0.1  # AdamW, as for the next two
head_lr = 0.006
vector_lr = 0.015
beta1 = 0.8
beta2 = 0.95
max_iters = 1200
warmup_iters = 0
warmdown = 0.7  # the last 70 % decay linearly to zero
min_lr = 0.0

compile = False  # compiling takes a minute and gains nothing at this size
