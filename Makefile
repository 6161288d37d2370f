PYTHON ?= .venv/bin/python

.PHONY: lint test
lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
test:
	$(PYTHON) -m pytest
