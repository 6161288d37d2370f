.PHONY: help install install-fast test-fast test slow lint docs notebooks wheel bench
PYTHON ?= .venv/bin/python
# Linux needs MLX's backend; macOS has it.
CPU = $(if $(filter Darwin,$(shell uname)),,cpu,)

help:
	@sed -n 's/^\([a-z-]*\):.*/make \1/p' $(MAKEFILE_LIST)

install:
	python3 -m venv .venv
	.venv/bin/pip install -q -e '.[$(CPU)test,dev]'

install-fast:
	python3 -m venv .venv
	.venv/bin/pip install -q -e '.[$(CPU)test-fast]'

# The three tiers of tests: CONTRIBUTING.md says what each takes.
test-fast:
	$(PYTHON) -m pytest --fast

test:
	$(PYTHON) -m pytest -n 2 --dist loadgroup

slow:
	$(PYTHON) -m pytest -m slow

lint:
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

docs:
	$(PYTHON) -m sphinx -W --keep-going -q -b html docs docs/_build
	$(PYTHON) .ci/check_site.py docs/_build

notebooks:
	$(PYTHON) .ci/check_notebooks.py

wheel:
	rm -rf dist
	$(PYTHON) -m build --wheel --no-isolation
	$(PYTHON) .ci/check_wheel.py dist/*.whl

bench:
	$(PYTHON) -m benchmarks.launches
	$(PYTHON) -m benchmarks.run --models 0.5B --repeats 1 --tokens 32
