# make demo   sets up .venv and runs real text through FP4 experts on four ranks
# make test   sets up .venv and runs the tests
# make lint   ruff, mypy, import rules        make bench   memory of a rank, serial against overlapped
# make soak   long runs: see docs/testing.md

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench soak clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/megamoe demo

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/installed
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/layer.py

soak: .venv/installed
	$(BIN)/python -m pytest -m soak

clean:
	rm -rf .venv build *.egg-info
