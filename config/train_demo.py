# A GPT small enough for `make demo` on a CPU: three minutes on two cores, from a loss of 10.8 to 4.2, 4.5 on val.bin.

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

# The recipe of the short night, with the rates of its proxy (benchmarks/recipe/).
architecture = "qwen3"
optimizer = "muon"
learning_rate = 0.02  # Muon's, for the matrices of the blocks
embedding_lr = 0.1  # AdamW's
head_lr = 0.006
vector_lr = 0.015
beta1 = 0.8
beta2 = 0.95
max_iters = 1200
warmup_iters = 0
warmdown_iters = 840  # constant until here from the end, then linear to nothing
lr_decay_iters = 1200
min_lr = 0.0

compile = False  # it would gain nothing at this size, and take a minute
