"""The package behind the stage scripts. Each module imports only those before it; startup alone
imports device too, once a script has run out of memory:

errors, wording, startup, process: sentences, the console, signals, locks, files
tokenizer, text, bins, distributed, windows: from text to windows of tokens
device, settings, schedule, muon, optim, memory, int8: what a run uses
generate, hf, checkpoint: models from and for files
trainer, plan, records, page: a run
"""
