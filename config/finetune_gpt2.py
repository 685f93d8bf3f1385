# Finetune GPT-2 (124M) on data/finetune, prepared from a parquet file of your own:
#     python prepare_single_parquet.py mine.parquet --out_dir=data/finetune --val_fraction=0.05
# To start from a model of your own, the short night's or the long night's:
#     --init_from=out-fineweb-fast/best.pt --architecture=qwen3 --n_head=6 --bias=False
#     --init_from=out-fineweb-single-parquet/best.pt --bias=False

out_dir = "out-finetune"
# A name on the Hugging Face hub, or a folder with config.json and model.safetensors.
init_from = "gpt2"
eval_interval = 20
eval_iters = 40
log_interval = 1
# The dataset is small: save when val loss improves, every 10 minutes, and at the end. best.pt has
# the best weights.
always_save_checkpoint = False

dataset = "finetune"
gradient_accumulation_steps = 2
batch_size = 16  # 2 * 16 * 1024 = 32,768 tokens per iteration, as in nanoGPT's finetune_shakespeare
block_size = 1024

# The shape of the pretrained model.
n_layer = 12
n_head = 12
n_embd = 768
bias = True

# A small constant learning rate, to preserve what the model has already learned.
learning_rate = 3e-5
decay_lr = False
max_iters = 200
early_stop_patience = 3
