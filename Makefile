# make demo: watch the embedded model find a needle in 16k tokens. make test: run the tests.
# Both set up .venv in the checkout first; nothing outside it is changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check install -c constraints.txt
PYTEST_ARGS ?= -q -n auto --maxprocesses 8

.PHONY: demo test lint clean

demo: $(VENV)/.base
	$(BIN)/attnpatch demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) # one thread a worker: workers fill the cores

lint: $(VENV)/.dev
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "setting up $(VENV) (the first time this takes some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch==2.13.0
	@touch $@

$(VENV)/.base: $(VENV)/.torch pyproject.toml
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@$(PIP) -e '.[dev]'
	@touch $@
