# `make demo` trains a small model and generates from it. `make test` runs the tests.
# `make check` runs ruff and mypy, and builds the documentation's site. `make test PYTHON=python3.13`
# does it with another Python, in an environment of its own, .venv-3.13.
PYTHON ?= python3
ifneq ($(filter python3.%, $(PYTHON)),)
# Where pyenv provides python3.13, it runs only when this variable names its version.
RUN_PYTHON = PYENV_VERSION=$(patsubst python%,%,$(PYTHON)) $(PYTHON)
else
RUN_PYTHON = $(PYTHON)
endif
ifeq ($(origin PYTHON), file)
VENV ?= .venv
else
VENV ?= .venv-$(shell $(RUN_PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])")
endif
ifeq ($(OS), Windows_NT)
BIN = $(VENV)/Scripts
else
BIN = $(VENV)/bin
endif
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo test check format clean

# One environment serves all targets. It is updated when the metadata changes.
$(BIN)/.ready: pyproject.toml setup.py
	$(RUN_PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test,docs]"
	touch $@

demo: $(BIN)/.ready
	$(BIN)/python -c "import runpy; from gpt_2_simple.common.stderr_filter import filter_stderr as f; \
	f(); runpy.run_path('examples/demo.py', run_name='__main__')"

# Two processes, as most tests keep one core busy. A file's tests stay together. A process that
# crashes ends the tests: pytest-xdist 3.8 waits for ever after it starts another one.
test: $(BIN)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0
	@$(BIN)/python -c "import importlib.metadata as m, platform as p; \
	print('The tests pass on Python', p.python_version(), 'and TensorFlow', m.version('tensorflow'))"

check: $(BIN)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/build_site.py

format: $(BIN)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
