.PHONY: install test slow lint docs bench wheel
PYTHON ?= .venv/bin/python
# Linux needs MLX's backend; macOS has it.

install:
	python3 -m venv .venv
	.venv/bin/pip install -q -e '.[$(if $(filter Darwin,$(shell uname)),,cpu,)test,dev]'

test:
	$(PYTHON) -m pytest

slow:
	$(PYTHON) -m pytest -m slow

lint:
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

docs:
	$(PYTHON) -m sphinx -W --keep-going -q -b html docs docs/_build

bench:
	$(PYTHON) -m benchmarks.launches
	$(PYTHON) -m benchmarks.run --models 0.5B --repeats 1 --tokens 32

wheel:
	$(PYTHON) -m build --wheel
