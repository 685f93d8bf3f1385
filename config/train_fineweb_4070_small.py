# A 30M model for a first evening on the same data: 6 layers, 6 heads, width 384. The config that
# circulates for this card calls it 84M.

out_dir = "out-fineweb-single-parquet-small"
eval_interval = 500
eval_tokens = 3_276_800
log_interval = 50
always_save_checkpoint = True

# Optional: without wandb, a key or a network, training prints a message and continues.
wandb_log = True
wandb_project = "fineweb"
wandb_run_name = "30M-single-parquet-4070"

dataset = "fineweb"
tokens_per_iter = 524_288  # 8 micro-batches of 64 windows
batch_size = 64
block_size = 1024

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.0
bias = False

learning_rate = 6e-4
max_iters = 8000
warmup_iters = 500
min_lr = 6e-5
beta2 = 0.99
weight_decay = 0.1

# The val loss of OpenAI's GPT-2 of 124M parameters on FineWeb, drawn in loss.png.
reference_loss = 3.28
reference_label = "GPT-2 (124M) on FineWeb"

compile = True
