# Each target makes .venv and installs by itself; only Python >= 3.11 is needed before.
# pip's own variables (PIP_INDEX_URL, PIP_FIND_LINKS, ...) and, with UV=1, uv's (UV_INDEX, ...) are honoured.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
UV ?=
ifeq ($(UV),)
INSTALL = $(BIN)/python -m pip install --quiet
else
INSTALL = uv pip install --quiet --python $(BIN)/python
endif
TEST_ENV = OMP_NUM_THREADS=1 MPLBACKEND=agg

.PHONY: help demo test check quick bench gpu wheels docs look lab clean lock test-oldest test-newest

help: ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "wsol_nb needs Python 3.11 or newer; none was found. Try: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "making $(VENV) with $(PYTHON)"
	@$(if $(UV),uv venv --quiet --python $(PYTHON) $(VENV),$(PYTHON) -m venv $(VENV))

$(VENV)/.run: setup.py settings.ini constraints.txt | $(VENV)/bin/python
	@echo "installing wsol_nb"
	@$(INSTALL) -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "installing the development tools"
	@$(INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.run ## a synthetic world, a CAM classifier, F-CAM on it, a table and demo/report.html
	@$(BIN)/wsol_demo

test: check ## every notebook and every test, on the development pins (CI adds the two below)

check: $(VENV)/.dev ## notebooks and modules in sync, every notebook runs, every test passes
	@$(TEST_ENV) $(BIN)/python tools/sync.py
	@$(TEST_ENV) $(BIN)/nbdev_test --n_workers 2 --timing
	@$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist worksteal

quick: $(VENV)/.dev ## under a minute: sync, imports and the notebooks touched since HEAD
	@$(TEST_ENV) $(BIN)/python tools/sync.py
	@$(TEST_ENV) $(BIN)/python -m pytest -q tests/test_house.py
	@for nb in $$(git diff --name-only --diff-filter=d HEAD -- 'nbs/*.ipynb'; git ls-files -o --exclude-standard -- 'nbs/*.ipynb'); do \
	  $(TEST_ENV) $(BIN)/nbdev_test --path $$nb --do_print || exit 1; done

test-oldest: $(VENV)/.dev ## the built wheel beside the oldest releases that settings.ini allows, in an environment of its own
	@$(BIN)/python tools/releases.py oldest

test-newest: $(VENV)/.dev ## the same beside the newest, on each Python of 3.11 to 3.13 that is installed
	@$(BIN)/python tools/releases.py newest

lock: $(VENV)/.dev ## renew constraints-oldest.txt and constraints-newest.txt
	@$(BIN)/python tools/releases.py lock

bench: $(VENV)/.dev ## speed, as ratios against a peer in the same run
	@$(BIN)/python tools/bench.py

PY ?= python3
gpu: ## on a machine with a CUDA device, no network needed: right and fast? PY=python3 WHEELS=wheels GPU="--parts training"
	@$(PY) tools/gpu.py $(if $(WHEELS),--wheels $(WHEELS)) $(GPU)

wheels: $(VENV)/.dev ## the folder wheels for make gpu: what a Python with torch, timm and the scientific stack may lack
	@$(BIN)/python tools/wheels.py $(TO)

docs: $(VENV)/.dev ## the site in _docs; without quarto, the processed notebooks and their links are checked
	@$(BIN)/python tools/docs.py

look: $(VENV)/.dev ## the site of make docs in headless Chromium: no code is cut, nothing sticks out of a narrow window
	@$(BIN)/python tools/look.py

lab: $(VENV)/.dev ## JupyterLab on the notebooks
	@$(BIN)/jupyter lab --notebook-dir nbs $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB)

clean: ## remove what make made, .venv and your runs excepted
	@rm -rf demo _docs _proc build dist .pytest_cache *.egg-info
