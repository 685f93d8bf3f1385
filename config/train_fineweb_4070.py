# GPT-2 (124M) on one FineWeb parquet file and one 12 GB RTX 4070.
# These are the values of the config that circulates for this card, with two corrections, each
# marked below.

out_dir = "out-fineweb-single-parquet"
eval_interval = 500
eval_tokens = 3_276_800  # eval_iters=200 of 16 windows, whatever batch_size becomes
log_interval = 50
always_save_checkpoint = True

# Optional: without wandb, a key or a network, training prints a message and continues.
wandb_log = True
wandb_project = "fineweb"
wandb_run_name = "125M-single-parquet-4070"

dataset = "fineweb"
# 32 micro-batches of 16 windows. A smaller batch_size takes less memory, and needs more of them.
tokens_per_iter = 524_288
batch_size = 16
block_size = 1024

# Corrected: n_embd was 512, which is not divisible by 12 heads; with 8 heads it would be a 64M
# model. GPT-2's 124M has 12 layers, 12 heads and width 768.
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0
bias = False

learning_rate = 5e-4
# 3.15 billion tokens, about 4.5 epochs of one file of 0.7 billion, so two files are better.
max_iters = 6000
warmup_iters = 500
min_lr = 5e-5
beta2 = 0.99
weight_decay = 0.1

# The val loss of OpenAI's GPT-2 of 124M parameters on FineWeb, drawn in loss.png.
reference_loss = 3.28
reference_label = "GPT-2 (124M) on FineWeb"

# Corrected: "stop when it is under 3.5 to 4.0 perplexity" meant the loss, in nats per token.
# GPT-2's 3.28 is a perplexity of 27.

compile = True

# On a GeForce card with torchao: int8 products, if they are faster there.
int8 = "auto"
