# Everything starts from Python (3.10 or newer), make and the package index. `make` lists the targets.

PYTHON ?= python3
VENV ?= .venv
PYTEST_FLAGS ?=
# Processes that share the tests' files, 3 GB of memory each; WORKERS=0 runs all in one. The files with few long tests
# (integration, parity) come first, so that no process is left with one of them at the end.
WORKERS ?= 2
UPGRADE ?=

PY := $(VENV)/bin/python
LOCK := requirements-dev.lock
INSTALLED := $(VENV)/.installed

# One thread a process: the tests' tensors are small, and threads that wait for each other cost more than they do.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow check format bench docs site dist lock clean

help: ## List the targets.
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

install: $(INSTALLED) ## Make the environment: locked packages, this project, detectron2.

quickstart: $(INSTALLED) ## Run the whole job on a small data set drawn here, and write a report.
	$(VENV)/bin/proxydet quickstart

test: $(INSTALLED) ## Run the tests, but for the slow ones.
	$(PY) -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

test-slow: $(INSTALLED) ## Run the slow tests.
	$(PY) -m pytest -m slow $(PYTEST_FLAGS)

check: $(INSTALLED) ## Lint, format and types, without changing anything.
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(INSTALLED) ## Lay out the code and sort its imports.
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(INSTALLED) ## Measure start-up time; other measurements are scripts in benchmarks/.
	$(PY) benchmarks/startup.py

docs: $(INSTALLED) ## Write the reference pages and the notebook from the program and the tutorial.
	$(PY) -m proxydet_cli.reference docs/reference

site: $(INSTALLED) ## Build the documentation's site in build/site; any broken link is an error.
	test -d build/site-env || $(PY) -m uv venv --quiet --python $(PY) build/site-env
	$(PY) -m uv pip install --quiet --python build/site-env --group site
	build/site-env/bin/python -m sphinx -q -W --keep-going -c docs . build/site

dist: $(INSTALLED) ## Build sdist and wheel in dist/ and check their metadata.
	rm -rf dist build/lib
	$(PY) -m uv build --quiet --no-build-isolation --python $(PY)
	$(PY) -m uv tool run twine check --strict dist/*

lock: $(INSTALLED) ## Resolve the dependencies into the lock files; UPGRADE=--upgrade takes newer versions.
	$(PY) -m uv pip compile $(LOCK_FLAGS) --output-file requirements.lock pyproject.toml
	$(PY) -m uv pip compile $(LOCK_FLAGS) --output-file $(LOCK) --extra dev --constraints requirements.lock pyproject.toml

LOCK_FLAGS = $(UPGRADE) --quiet --universal --python-version 3.10 --generate-hashes --no-emit-index-url \
	--no-annotate --custom-compile-command "make lock"

clean: ## Remove the environment and what tools left behind.
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info

$(PY):
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed; say which: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(LOCK) pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check uv
	$(PY) -m uv pip install --quiet --compile-bytecode --python $(PY) --require-hashes --requirements $(LOCK) \
		|| $(PY) -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $(LOCK)
	$(PY) -m uv pip install --quiet --python $(PY) --no-build-isolation --no-deps --editable .
	$(VENV)/bin/proxydet setup
	@touch $@
