# `make demo` trains and writes with no download; `make test` passes the tests; `make check` lints.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo test check clean

# One environment for all three; made again when the metadata changes.
$(BIN)/.ready: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

demo: $(BIN)/.ready
	$(BIN)/python examples/demo.py

test: $(BIN)/.ready
	$(BIN)/python -m pytest

check: $(BIN)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
