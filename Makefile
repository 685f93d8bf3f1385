# All targets run in the project's own virtual environment, .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/run
	$(BIN)/python make_demo.py
	$(BIN)/python prepare_single_parquet.py data/demo/train --out_dir=data/demo --val_fraction=0.05 --overwrite
	rm -rf out-demo
	$(BIN)/python train.py config/train_demo.py --hours=0.05
	$(BIN)/python sample.py --out_dir=out-demo --num_samples=3 --max_new_tokens=200
	@echo "The loss curve is in out-demo/loss.png. To use the model in other tools (see docs/use_your_model.md):"
	@echo "$(BIN)/python -m pip install transformers && $(BIN)/python export.py --out_dir=out-demo --export_dir=my-gpt"

# Two processes of one thread each, for two cores.
test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis out-demo data/demo

$(VENV)/run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/run
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@
