# Needs python3 (3.11 or later) and make. `make` alone lists the targets.
PYTHON ?= python3
VENV = .venv
LOWER = .venv-lower
# An index that has CPU builds of torch, for machines where pip's usual one gives a CUDA build.
TORCH_INDEX ?=
# Set to 1 to keep a CUDA build of torch.
ALLOW_CUDA ?=
# Test processes (one thread each), and more arguments for pytest.
WORKERS = 2
ARGS =

PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
SPREAD = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP = -m pip install --quiet --disable-pip-version-check --no-input

.PHONY: help env demo test test-lower bench check format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -e 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r name about; do printf '  make %-12s%s\n' "$$name" "$$about"; done

env: $(VENV)/.installed ## set up the environment in .venv (once)

demo: env ## train a soft prompt for the default model and try it
	@echo "Running the demo."
	@$(VENV)/bin/softprompts quickstart

test: env ## run all tests; ARGS="-k word" passes more to pytest
	@echo "Running the tests in $(WORKERS) processes."
	@$(PYTEST) $(VENV)/bin/python -m pytest $(SPREAD) $(ARGS)

test-lower: $(LOWER)/.installed ## run the golden tests at the lower end of the supported versions
	@echo "Running the golden tests at the lower end of the supported versions."
	@$(PYTEST) $(LOWER)/bin/python -m pytest $(SPREAD) -m golden $(ARGS)

bench: env ## measure speed and memory beside PEFT, about half an hour; ARGS="--resume" goes on
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

# An environment with a CUDA build nobody asked for is removed: pip would not replace it by a CPU build of the same version.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(call install,$(VENV),constraints.txt,dev)

$(LOWER)/.installed: pyproject.toml constraints-lower.txt
	@$(call install,$(LOWER),constraints-lower.txt,test)

# $(1) the environment, $(2) the pinned versions, $(3) the extra
define install
command -v $(PYTHON) > /dev/null || { echo "There is no $(PYTHON) here: install Python 3.11 or later, or say make PYTHON=..." >&2; exit 1; }; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), but 3.11 or later is needed: say make PYTHON=python3.11" >&2; exit 1; }; \
echo "Setting up $(1): about 1 GB, some minutes, once."; \
{ $(PYTHON) -m venv $(1) \
&& { test -z "$(TORCH_INDEX)" || $(1)/bin/python $(PIP) --constraint $(2) --index-url "$(TORCH_INDEX)" torch; } \
&& $(1)/bin/python $(PIP) --constraint $(2) --editable ".[$(3)]" \
&& { ALLOW_CUDA="$(ALLOW_CUDA)" $(1)/bin/python .ci/no_cuda.py || { rm -rf $(1); false; }; } \
&& touch $(1)/.installed; } || { echo "$(1) could not be set up; the reason is above." >&2; exit 1; }
endef
