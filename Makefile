# `make demo` and `make test` set everything up by themselves; see README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test fuzz check format docs evidence clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/muonwire compare --preset quick --out runs/demo

test: setup
	$(BIN)/python -m pytest

fuzz: setup
	$(BIN)/python -m fuzz.codec --cases 200000 --out runs/fuzz

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup
	$(BIN)/python docs/generate.py

evidence: setup
	$(BIN)/muonwire compare --preset frontier --virtual --compile --out runs/frontier
	cp runs/frontier/summary.json evidence/frontier.json

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
