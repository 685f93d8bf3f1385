# The short night: a modern 12-layer GPT, trained with Muon on one FineWeb parquet file and one
# 12 GB RTX 4070. With --hours=8, the length of the run follows from the speed of the card.
#
# Without --hours, the length is max_iters, chosen as follows. The only clean public measurement of
# a similar recipe (modded-nanogpt's track 3, result 36: 124M, 1,024 tokens, FineWeb) reaches
# GPT-2's val loss of 3.28 after 1.70 billion tokens, and gains 0.146 for each e-fold of tokens. The
# plan for a 4070 (--plan --plan_card="RTX 4070") is 63,600 tokens/s: 1.70 billion tokens take 7 h
# 26 min, --hours=8 gives about 1.8 billion and a loss of 3.27, and --hours=5 gives 1.12 billion and
# about 3.34. At the 55,700 tokens/s that a 4070 was reported to reach with nanochat's d12 (4 % more
# FLOPs per token, and more memory traffic), 8 hours are 1.57 billion tokens and a loss of 3.29.
#
# These are estimates: nobody has trained this config on that card yet. This run also reads a file
# of 0.7 billion tokens more than twice, while the 3.28 was reached on text that does not repeat.

out_dir = "out-fineweb-fast"
eval_interval = 100
eval_iters = 100
log_interval = 10
always_save_checkpoint = True

# Optional: without wandb, a key or a network, training prints a message and continues.
wandb_log = True
wandb_project = "fineweb"
wandb_run_name = "qwen3-muon-4070"

dataset = "fineweb"
# 32 * 16 * 1024 = 524,288 tokens per iteration, as in track 3: all rates below were measured with
# it. A small model does worse with half as many, and no worse with more (benchmarks/recipe).
gradient_accumulation_steps = 32
batch_size = 16
block_size = 1024

# Rotary positions, normalized queries and keys, SwiGLU, RMSNorm, an untied output head.
architecture = "qwen3"
n_layer = 12
n_head = 6  # each of width 128, as in modded-nanogpt and nanochat
n_embd = 768
dropout = 0.0
bias = False

# From modded-nanogpt's track 3: NorMuon at 0.035 with a decay of 0.025 (result 10), and AdamW at
# 0.7, 0.004 and 0.015 (result 36). Muon also has cautious decay (result 46), EMA-Nesterov (result
# 39) and two-speed momentum (pull request 340). Others measured each of these in its own setting.
# Without the last, they and their rates were together better than plain Muon with nanochat's, in
# one run each over 23 million tokens; they have not been tried for a whole night
# (benchmarks/recipe/README.md).
optimizer = "muon"
learning_rate = 0.035  # Muon, for the matrices of the blocks
embedding_lr = 0.7  # AdamW, as for the next two
head_lr = 0.004
vector_lr = 0.015  # for the gains
weight_decay = 0.025
beta1 = 0.8
beta2 = 0.95

max_iters = 3250  # 1.70 billion tokens
warmup_iters = 20
# Constant, then linear to zero: over the last 40 % for AdamW, and over the last 80 % for Muon
# (result 24).
warmdown_iters = 1300
matrix_warmdown_iters = 2600
lr_decay_iters = 3250
min_lr = 0.0

compile = True

# The matrix products of the blocks' linear layers in int8, with torchao: by the plan 1.22 times as
# fast. Over 27 million tokens the loss was the same, but the H200 that trained them was slower. No
# GeForce card has been measured here (README).
# int8 = True
