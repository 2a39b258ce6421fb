# make demo    a bare checkout to out/demo/index.html        make test    the test suite
# Both set everything up first: a virtual environment, the pinned torch, the compiled operators.
PYTHON ?= python3
VENV   ?= .venv
TORCH   = requirements/torch.txt
BIN     = $(VENV)/bin
PARALLEL ?= -n 2 --dist loadfile # two test processes of one thread each

demo: $(VENV)/built
	$(BIN)/dit-ops demo

test: $(VENV)/built
	$(BIN)/python -m pytest $(PARALLEL)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) tests/triton

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On a machine whose python has torch with CUDA, without a virtual environment: build, test, sanitize, measure, in under 9 minutes
GPU_PYTHON = PYTHONPATH=. $(PYTHON)
OP_TESTS   = $(sort tests/test_library.py $(wildcard $(patsubst dit_ops/ops/%.py,tests/test_%.py,$(wildcard dit_ops/ops/*.py))))
GPU_TESTS  = $(filter-out $(OP_TESTS),$(sort $(shell grep -l 'mark\.gpu' tests/test_*.py)))
SANITIZER  = $(firstword $(shell command -v compute-sanitizer) $(wildcard /usr/local/cuda/bin/compute-sanitizer) compute-sanitizer)
SANITIZE   = $(SANITIZER) --error-exitcode 1
LAST       = ema_update attention
BENCHES    = machine $(filter-out machine generate $(LAST),$(patsubst bench/bench_%.py,%,$(wildcard bench/bench_*.py))) $(LAST)
GPU_BENCH ?= --shapes 4 --repeats 30
GPU_SECONDS ?= 535
ifndef GPU_END # the benches of the operators have what the other steps leave of GPU_SECONDS, from the start of make on
export GPU_END := $(shell expr $$(date +%s) + $(GPU_SECONDS))
endif

gpu: gpu-build
	$(MAKE) -k gpu-test gpu-generate gpu-sanitize gpu-bench

gpu-build:
	timeout 80 $(PYTHON) setup.py -q build_ext --inplace

gpu-test:
	timeout 80 env $(GPU_PYTHON) -m pytest --continue-on-collection-errors $(OP_TESTS); status=$$?; \
	    timeout 60 env $(GPU_PYTHON) -m pytest --continue-on-collection-errors -m gpu $(GPU_TESTS) && exit $$status

gpu-generate:
	timeout 140 env $(GPU_PYTHON) -m dit_ops bench generate --device cuda --seconds 60

# the first run compiles the Triton kernels of these shapes, the second finds them in the cache
gpu-sanitize: export PYTORCH_NO_CUDA_MEMORY_CACHING = 1
gpu-sanitize:
	PYTHONPATH=. timeout 70 $(SANITIZE) --tool memcheck $(PYTHON) tools/sanitize_ops.py --device cuda
	PYTHONPATH=. timeout 45 $(SANITIZE) --tool racecheck $(PYTHON) tools/sanitize_ops.py --device cuda

# a line is in the result file as soon as it is measured: the limit costs only what comes after it; alone it has all the time
gpu-bench:
	status=0; for op in $(BENCHES); do \
	    left=$$(($(GPU_END) - $$(date +%s))); test $$left -gt 5 || { echo "no time left for $$op"; status=1; continue; }; \
	    timeout $$left env $(GPU_PYTHON) -m dit_ops bench $$op --device cuda $(GPU_BENCH) || { echo "bench $$op failed"; status=1; }; \
	done; $(GPU_PYTHON) tools/performance_table.py && exit $$status

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

.PHONY: demo test lint bench build clean gpu gpu-build gpu-test gpu-generate gpu-sanitize gpu-bench
