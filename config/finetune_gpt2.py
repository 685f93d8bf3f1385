# GPT-2 (124M), trained further on data/finetune, made from a parquet file of your own:
#     python prepare_single_parquet.py mine.parquet --out_dir=data/finetune
# To begin with a model of your own: --init_from=out-fineweb-single-parquet/best.pt --bias=False.

out_dir = "out-finetune"
init_from = "gpt2"  # the name on the Hugging Face hub, or a folder with config.json and model.safetensors
eval_interval = 20
eval_iters = 40
log_interval = 1
always_save_checkpoint = False  # the data are few: save at better evaluations and at the end; best.pt is the best

dataset = "finetune"
gradient_accumulation_steps = 4
batch_size = 8  # 4 * 8 * 1024 = 32,768 tokens per iteration, as in nanoGPT's finetune_shakespeare
block_size = 1024

# The shape of what it begins with.
n_layer = 12
n_head = 12
n_embd = 768
bias = True

# A small constant rate, which does not undo what was learnt before.
learning_rate = 3e-5
decay_lr = False
max_iters = 200
early_stop_patience = 3
