# A GPT small enough for `make demo` on a CPU: in three minutes on two cores, the loss falls
# from 10.8 to 4.2, and to 4.6 on val.bin.

out_dir = "out-demo"
eval_interval = 200
eval_iters = 1
log_interval = 40

dataset = "demo"
gradient_accumulation_steps = 1
batch_size = 8
# 512 tokens per iteration: with so few tokens in total, many small steps learn more than few
# large ones.
block_size = 64

n_layer = 4
n_head = 4
n_embd = 64

# Much like the short night, with the learning rates of its proxy (benchmarks/recipe/).
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
warmdown_iters = 840  # the last 840 iterations decay linearly to zero
lr_decay_iters = 1200
min_lr = 0.0

compile = False  # compiling takes a minute and gains nothing at this size
