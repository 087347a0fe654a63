# Each target sets up what it needs; Python 3.11+ and make are enough.
# Tests run as two processes of one thread each: their tensors are small, and threads that wait for each other cost more than they give.
#   make quickstart   train a byte-level DeltaNet on Jane Austen, evaluate, generate, plot
#   make test         the whole test suite          make lint   ruff, mypy, the import contract
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    ?= runs/quickstart
TRITON := $(VENV)/triton-3.6.0# the oldest supported: kernels are compiled with it too, beside the one that is installed

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.installed
	$(BIN)/deltanet train --config recipes/quickstart.toml --out $(RUN)
	$(BIN)/deltanet evaluate $(RUN)
	$(BIN)/deltanet plot $(RUN)
	$(BIN)/deltanet generate $(RUN) --prompt "It is a truth universally acknowledged"

test: $(VENV)/.installed-dev $(TRITON)
	TRITON_FOLDERS=$$(ls -d $(CURDIR)/$(TRITON) 2>/dev/null) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --durations=10

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "deltanet needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[plot]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[plot,dev]'
	@touch $@

$(TRITON): | $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@.part $(subst -,==,$(notdir $@)) && mv $@.part $@ \
	|| echo "$(notdir $@) could not be installed: kernels are compiled with the installed Triton alone"
