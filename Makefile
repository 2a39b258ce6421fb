# make demo    a bare checkout to out/demo/index.html        make test    the test suite
# Both set everything up first: a virtual environment, the pinned torch, the compiled operators.
PYTHON ?= python3
VENV   ?= .venv
TORCH   = requirements/torch.txt
BIN     = $(VENV)/bin

demo: $(VENV)/built
	$(BIN)/dit-ops demo

test: $(VENV)/built
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/triton

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/built
	@test -n "$(OP)" || { echo "usage: make bench OP=<op>, one of: $(patsubst bench/bench_%.py,%,$(wildcard bench/bench_*.py))"; exit 1; }
	$(BIN)/python -m pytest tests/test_$(OP).py
	$(BIN)/python bench/bench_$(OP).py

build: $(VENV)/built

clean:
	rm -rf build dist *.egg-info dit_ops/_C_*.so .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# torch comes first and stays pinned (-c), so that no later resolution replaces a CPU build by a CUDA build
$(VENV)/installed: pyproject.toml $(TORCH)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r $(TORCH) "setuptools>=77" wheel ninja numpy
	DIT_OPS_BUILD=none $(BIN)/python -m pip install -q --no-build-isolation -c $(TORCH) -e ".[test]"
	touch $@

$(VENV)/built: $(VENV)/installed setup.py $(wildcard csrc/* csrc/*/*)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py -q build_ext --inplace
	touch $@

$(VENV)/dev: $(VENV)/built
	DIT_OPS_BUILD=none $(BIN)/python -m pip install -q --no-build-isolation -c $(TORCH) -e ".[dev]"
	touch $@

.PHONY: demo test lint bench build clean
