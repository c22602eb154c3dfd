# Every target makes what it needs: a virtual environment in .venv, then the package in it.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# On a machine without a GPU, PyTorch's own index of CPU wheels saves gigabytes: make ... TORCH_INDEX=<its address>
TORCH_INDEX ?=
# Workers for the test suite; each holds a small model.
WORKERS ?= 2

export TOKENIZERS_PARALLELISM := false

.PHONY: help setup quickstart test test-kills check format bench bench-scaling bench-smoke results support peft-suite clean
.DEFAULT_GOAL := help

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[quickstart,quantized,dev]'
	touch $@

setup: $(VENV)/.installed  ## make the virtual environment and install everything in it

quickstart: setup  ## train a real encoder on real text in a few minutes
	$(BIN)/ranktune train examples/quickstart.yaml

test: setup  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-kills: setup  ## runs killed at every step and in every file, and resumed (minutes)
	RANKTUNE_ALL_KILLS=1 $(BIN)/python -m pytest tests/test_killed_runs.py -n $(WORKERS)

check: setup  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: setup  ## rewrite the files the way `check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## time a training step and count what backward keeps, beside stock PEFT
	$(BIN)/python benchmarks/step_cost.py

bench-scaling: setup  ## how a step's time and memory grow with rank, width, modules and length; ten minutes
	$(BIN)/python benchmarks/scaling.py

bench-smoke: setup  ## a comparison, the scaling study and the page of results in miniature, in under three minutes
	rm -rf runs/bench-smoke
	$(BIN)/ranktune compare examples/compare.yaml --methods lora,dynamic-dora --seeds 2 --out runs/bench-smoke \
		train.max_steps=8 data.max_train_examples=64 data.max_eval_examples=64
	$(BIN)/python benchmarks/scaling.py --miniature --fresh --out runs/bench-smoke/scaling
	$(BIN)/python benchmarks/results_page.py --out runs/bench-smoke/results.md
	cd runs/bench-smoke && test -s report.html -a -s report.md -a -s table.csv -a -s score.png -a -s results.md

results: setup  ## write docs/results.md from the figures in benchmarks/results
	$(BIN)/python benchmarks/results_page.py

support: setup  ## docs/support.md: which methods work on which layers, seen by running them
	$(BIN)/python -m tests.support

peft-suite: setup  ## PEFT's own tests, pointed at our configs
	$(BIN)/python -m tests.peft_suite

clean:  ## remove the virtual environment, fetched sources and caches
	rm -rf $(VENV) .peft-suite .pytest_cache .ruff_cache
