# Needs make, and Python 3.11 to 3.14 or uv. `make` alone lists the targets.

# The Python for the environments; by default the first supported one on PATH.
PYTHON ?=
# An index that serves CPU builds of torch, for machines where pip's usual index serves a CUDA build.
TORCH_INDEX ?=
# Test processes (one thread each), and more arguments for pytest or the benchmarks: make test ARGS="-k word".
WORKERS = 2
ARGS =

VENV = .venv
LOWER = .venv-lower
SETUP = PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" sh scripts/setup-env.sh
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
SPREAD = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Threads that wait must sleep: with threads that spin, one busy neighbor makes a training step about three times as long.
OMP_WAIT_POLICY ?= PASSIVE
export OMP_WAIT_POLICY

.PHONY: help env env-lower demo test test-lower test-wheels house bench check format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s%s\n", $$1, $$2 }' Makefile

env: ## set up the environment in .venv (once)
	@$(SETUP) $(VENV) constraints.txt dev

env-lower:
	@$(SETUP) $(LOWER) constraints-lower.txt test

demo: env ## train a soft prompt for the default model and try it
	@echo "Running the demo."
	@$(VENV)/bin/softprompts quickstart

test: env ## run all tests; make test ARGS="-k word" passes more to pytest
	@echo "Running the tests in $(WORKERS) processes."
	@$(PYTEST) $(VENV)/bin/python -m pytest $(SPREAD) $(ARGS)

test-lower: env-lower ## run the golden tests at the lower end of the supported versions
	@echo "Running the golden tests at the lower end of the supported versions."
	@$(PYTEST) $(LOWER)/bin/python -m pytest $(SPREAD) -m golden $(ARGS)

test-wheels: env ## ask the package index for every dependency on Python 3.11 to 3.14, Linux and macOS
	@echo "Resolving the dependencies on Python 3.11 to 3.14, Linux and macOS."
	@$(VENV)/bin/python -m pytest -m index tests/test_packaging.py $(ARGS)

house: env ## print the measures of the source: size, names, layers
	@$(VENV)/bin/python -m tests.house

bench: env ## measure speed and memory beside PEFT, about 40 minutes; make bench ARGS="--resume" continues
	@echo "Running the benchmarks; the machine must have nothing else to do."
	@$(VENV)/bin/python -m benchmarks $(ARGS)

check: env ## what has to pass: format, lint, types, then all tests
	@echo "Checking the format."
	@$(VENV)/bin/ruff format --check .
	@echo "Checking the style."
	@$(VENV)/bin/ruff check .
	@echo "Checking the types."
	@$(VENV)/bin/mypy
	@$(MAKE) --no-print-directory test

format: env ## write the code in the common format
	@echo "Formatting."
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

clean: ## remove the environments and whatever was built (not the fetched models, nor runs/)
	@echo "Removing the environments and caches."
	@rm -rf $(VENV) $(LOWER) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests .ci -name __pycache__ -type d -prune -exec rm -rf {} +
