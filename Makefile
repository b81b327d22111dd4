# make quickstart   from nothing to a chat model that you trained yourself, on a CPU, in minutes
# make test         the tests (at most 10 minutes on 2 cores); make test-fast: at most 2
# Each creates .venv where it is missing, installs what is needed once, and does nothing twice.
# TORCH=cpu or TORCH=cu126 chooses the torch that is installed; PYTHON=... the interpreter.

SHELL := /bin/sh
IS_SUPPORTED = import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10 python; do \
	if $$p -c '$(IS_SUPPORTED)' 2>/dev/null; then echo $$p; break; fi; done)
TORCH ?= $(shell if nvidia-smi >/dev/null 2>&1; then echo cu126; else echo cpu; fi)
ifeq ($(origin TORCH),file)
TORCH := $(TORCH)
endif
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

.PHONY: help quickstart test test-fast test-long test-compat check format clean

help:
	@sed -n 's/^# //p' Makefile

quickstart: $(VENV)/.base
	$(PY) scripts/quickstart.py

test: $(VENV)/.dev
	$(PY) -m pytest -m "not long"

test-fast: $(VENV)/.dev
	$(PY) -m pytest -m "not long and not slow"

# proofs that take minutes, the quickstart among them
test-long: $(VENV)/.dev
	$(PY) -m pytest -m long

# the model, tokenizer and weights on the oldest and the last 4.x transformers that are supported
test-compat: .compat/4.51.3 .compat/4.57.6
	PYTHONPATH=.compat/4.51.3 $(PY) -m pytest tests/test_model.py tests/test_weights.py tests/test_tokenizer.py tests/test_chat.py
	PYTHONPATH=.compat/4.57.6 $(PY) -m pytest tests/test_model.py tests/test_weights.py tests/test_tokenizer.py tests/test_chat.py

check: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf .compat .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@if [ -z "$(PYTHON)" ]; then echo "no Python 3.10, 3.11 or 3.12 found: install one, or name it: make PYTHON=/path/to/python3.11"; exit 1; fi
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no virtual environment could be made: install python3-venv and run make again"; exit 1; }

# no retries first: where torch's own index cannot be reached, pip would wait for it before every single package
$(VENV)/.torch-$(TORCH): requirements-torch-$(TORCH).txt | $(VENV)/bin/python
	@if ls $(VENV)/.torch-* >/dev/null 2>&1; then $(PIP) uninstall -y torch; rm -f $(VENV)/.torch-*; fi
	$(PIP) install --retries 0 -r requirements-torch-$(TORCH).txt || $(PIP) install -r requirements-torch-$(TORCH).txt
	@touch $@

$(VENV)/.base: requirements.txt $(VENV)/.torch-$(TORCH)
	$(PIP) install -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.base
	$(PIP) install -r requirements-dev.txt
	@touch $@

.compat/%: | $(VENV)/.dev
	rm -rf $@.tmp
	$(PIP) install --quiet --target $@.tmp "transformers==$*"
	mv $@.tmp $@
