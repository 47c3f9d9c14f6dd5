# Each target sets up .venv by itself; PYTHON may name any Python 3.11 to 3.13.
PYTHON ?= python3
BIN := .venv/bin
OUT := runs/quickstart

.PHONY: quickstart test check format clean

quickstart: .venv/ready ## train a router for the shipped teacher, and compare
	$(BIN)/python -m train fit --config configs/quickstart.yaml
	$(BIN)/python -m train.report --router $(OUT)/router.safetensors \
	  --model checkpoints/fashion_mnist_dit --judge checkpoints/fashion_mnist_classifier \
	  --out $(OUT)

test: .venv/ready ## run the tests
	$(BIN)/python -m pytest -q

check: .venv/ready ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) \
	  else f'l2c needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}: run make PYTHON=python3.12 ...')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[train,dev]"
	touch .venv/ready

clean: ## remove the environment and what runs have written
	rm -rf .venv runs
