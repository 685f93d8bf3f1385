# Finetune GPT-2 (124M) on data/finetune, prepared from a parquet file of your own:
#     python prepare_single_parquet.py mine.parquet --out_dir=data/finetune --val_fraction=0.05
# To start from a model of your own, with its shape: --init_from=out-fineweb-fast/best.pt

out_dir = "out-finetune"
# A name on the Hugging Face hub, or a folder with config.json and model.safetensors.
init_from = "gpt2"
eval_interval = 20
eval_tokens = 655_360
log_interval = 1
# The dataset is small: save when val loss improves, every 10 minutes, and at the end. best.pt has
# the best weights.
always_save_checkpoint = False

dataset = "finetune"
tokens_per_iter = 32_768  # as in nanoGPT's finetune_shakespeare
batch_size = 16
block_size = 1024

# A small constant learning rate, to preserve what the model has already learned.
learning_rate = 3e-5
decay_lr = False
max_iters = 200
early_stop_patience = 3
