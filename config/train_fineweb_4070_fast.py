# The short night: a modern 12-layer GPT, trained with Muon on one FineWeb parquet file and one
# 12 GB RTX 4070. With --hours=8, the length of the run follows from the speed of the card.
#
# Without --hours, the length is max_iters, chosen as follows. The only clean public measurement of
# a similar recipe (modded-nanogpt's track 3, result 36: 124M, 1,024 tokens, FineWeb) reaches
# GPT-2's val loss of 3.28 after 1.70 billion tokens; the loss falls by 0.10 with each doubling of
# tokens. At the 55,700 tokens/s that a 4070 was reported to reach with a model of this size, 8
# hours are 1.60 billion tokens and a loss of 3.29, and 5 hours are 1.00 billion and 3.36.
#
# These are estimates: nobody has trained this config on that card yet. This run also reads a file
# of 0.7 billion tokens more than twice, while the 3.28 was reached on text that does not repeat.

out_dir = "out-fineweb-fast"
eval_interval = 100
eval_tokens = 1_638_400
log_interval = 10
always_save_checkpoint = True

# Optional: without wandb, a key or a network, training prints a message and continues.
wandb_log = True
wandb_project = "fineweb"
wandb_run_name = "qwen3-muon-4070"

dataset = "fineweb"
# As in track 3: all rates below were measured with it. A small model does worse with half as many,
# and no worse with more (benchmarks/LOG.md). It is 32 micro-batches of 16 windows; a smaller
# batch_size takes less memory, and needs more of them.
tokens_per_iter = 524_288
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
# (benchmarks/LOG.md).
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
warmdown = 0.4
matrix_warmdown = 0.8
min_lr = 0.0

# The val loss of OpenAI's GPT-2 of 124M parameters on FineWeb, drawn in loss.png.
reference_loss = 3.28
reference_label = "GPT-2 (124M) on FineWeb"

compile = True

# On a GeForce card with torchao: int8 products in the blocks, if they are faster there, which is
# measured at the start of the run. Over 27 million tokens the loss was the same.
int8 = "auto"
