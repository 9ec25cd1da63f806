# Every target sets up what it needs: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Spinning threads starve each other where cores are shared (docs/log.md).
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test check bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@

demo: $(VENV)/.installed      ## a server and ten devices on this machine, over HTTPS
	$(BIN)/splitfrozen demo

test: $(VENV)/.installed      ## all tests; no network
	$(BIN)/pytest

check: $(VENV)/.installed     ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed     ## MRPC on ten devices; needs the data and a MiniLM folder
	$(BIN)/python benchmarks/mrpc.py

clean:
	rm -rf $(VENV) runs
