# The short night: a modern 12-layer GPT, trained by Muon, on one FineWeb parquet file and one 12 GB RTX 4070.
# With --hours=8 the run sets its own length, by the speed of the card it is on.
#
# Its length otherwise, max_iters: the one clean public measure of such a recipe (modded-nanogpt's track 3: 124M, 1,024
# tokens, FineWeb) reaches a val loss of 3.28, GPT-2's, after 1.70 billion tokens, and gains 0.146 for each e-fold of
# tokens. A 4070 was reported to train 55,700 tokens/s of nanochat's d12, whose 887 MFLOP per token are 4 % more than
# this model's: 1.70 billion take 8 h 15 min to 8 h 30 min there. So --hours=8 is about 1.60 billion and 3.29; --hours=5
# is 1.00 billion, about 3.36. Expected, not run: nobody has trained this config on that card yet; and a file of 0.7
# billion tokens is read more than twice, where the 3.28 was reached on text that does not repeat.

out_dir = "out-fineweb-fast"
eval_interval = 200
eval_iters = 100
log_interval = 20
always_save_checkpoint = True

wandb_log = True  # optional: without wandb, a key or a network the run goes on, and says so
wandb_project = "fineweb"
wandb_run_name = "qwen3-muon-4070"

dataset = "fineweb"
# 8 * 32 * 1024 = 262,144 tokens per iteration, half of what the recipes for eight GPUs take: one card gains nothing
# by fewer and larger steps.
gradient_accumulation_steps = 32
batch_size = 8
block_size = 1024

architecture = "qwen3"  # rotary positions, normalised queries and keys, SwiGLU, RMSNorm, a head of its own
n_layer = 12
n_head = 6  # each 128 wide, as in modded-nanogpt and nanochat
n_embd = 768
dropout = 0.0
bias = False

# nanochat's rates for 12 layers and 524,288 tokens per iteration (0.02, 0.3, 0.008; for the gains modded-nanogpt's,
# 0.015), times the root of a half.
optimizer = "muon"
learning_rate = 0.014  # Muon's, for the matrices of the blocks
embedding_lr = 0.2  # AdamW's
head_lr = 0.0055
vector_lr = 0.0106  # of the gains
weight_decay = 0.05
beta1 = 0.8
beta2 = 0.95

max_iters = 6500  # 1.70 billion tokens
warmup_iters = 40
warmdown_iters = 4550  # a trapezoid: constant until here from the end, then linear to nothing
lr_decay_iters = 6500
min_lr = 0.0

compile = True
