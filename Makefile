.PHONY: help install install-fast test-fast test slow lint docs notebooks wheel bench
PYTHON ?= .venv/bin/python
# Linux needs MLX's backend; macOS has it.
CPU = $(if $(filter Darwin,$(shell uname)),,cpu,)

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## everything, in .venv (PyTorch too)
	python3 -m venv .venv
	.venv/bin/pip install -q -e '.[$(CPU)test,dev]'

install-fast: ## what the fast tests need, in .venv
	python3 -m venv .venv
	.venv/bin/pip install -q -e '.[$(CPU)test-fast]'

# The three tiers of tests: CONTRIBUTING.md says what each takes.
test-fast: ## tests without PyTorch and the real model: 2 minutes
	$(PYTHON) -m pytest --fast

test: ## all tests but the slow ones: 17 minutes on two cores
	$(PYTHON) -m pytest -n 2 --dist loadgroup

slow: ## the slow tests
	$(PYTHON) -m pytest -m slow

lint: ## ruff and mypy
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

docs: ## the pages, in docs/_build
	$(PYTHON) -m sphinx -W --keep-going -q -b html docs docs/_build
	$(PYTHON) .ci/check_site.py docs/_build

notebooks: ## run the notebooks: no cell may fail
	$(PYTHON) .ci/check_notebooks.py

wheel: ## build and check a wheel
	rm -rf dist
	$(PYTHON) -m build --wheel --no-isolation
	$(PYTHON) .ci/check_wheel.py dist/*.whl

bench: ## two short benchmarks
	$(PYTHON) -m benchmarks.launches
	$(PYTHON) -m benchmarks.run --models 0.5B --repeats 1 --tokens 32
