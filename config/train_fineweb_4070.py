# GPT-2 (124M) on one FineWeb parquet file and one 12 GB RTX 4070.
# The values first noted for this card, with two corrections, each marked below.

out_dir = "out-fineweb-single-parquet"
eval_interval = 500
eval_iters = 200
log_interval = 50
always_save_checkpoint = True

wandb_log = True  # optional: without wandb, a key or a network the run goes on, and says so
wandb_project = "fineweb"
wandb_run_name = "125M-single-parquet-4070"

dataset = "fineweb"
gradient_accumulation_steps = 32
batch_size = 16  # 16 * 32 * 1024 = 524,288 tokens per iteration
block_size = 1024

# Corrected: n_embd was 512. That is no multiple of 12 heads, so no model at all;
# and with 8 heads it would be 64M. The 124M of GPT-2 is 12 layers, 12 heads, 768 wide.
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0
bias = False

learning_rate = 5e-4
max_iters = 6000  # 3.15 billion tokens: about 4.5 epochs of one file of 0.7 billion, so two files are better
warmup_iters = 500
lr_decay_iters = 6000
min_lr = 5e-5
beta2 = 0.99
weight_decay = 0.1

# Corrected: "stop when it is under 3.5 to 4.0 perplexity" meant the loss, in nats per token.
# GPT-2 itself has a loss of about 3.3 on FineWeb, which is a perplexity of 27.

compile = True
