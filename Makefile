# make demo     install what is missing, then run the whole demo
# make test     install what is missing, then run the test suite, with a worker for each core
# make check    lint, format, types, import contracts, sizes of files, folders and functions
# make chaos    kills, signals, corruption, full disks, little memory, fuzzing: an hour at most, seeded
# make docs     the documentation as a site in site/, by tools in .venv-docs; fails on a dead link
# make pictures the pictures and tables of the documents anew, from committed results
#
# Needs Python 3.11 or newer, git and make; no compiler. Everything goes into .venv, once: a stamp file
# there marks each finished step. Variables:
#   PYTHON=python3.12      the interpreter that makes .venv
#   TORCH='torch==2.13.0+cu130 --index-url https://download.pytorch.org/whl/cu130'
#                          which torch; without it a torch >= 2.11 that .venv already has is kept
#   ARGS='...'             more arguments for run_helm.py (demo) or pytest (test; -n 0 for no workers)

VENV ?= .venv
DOCS_VENV ?= .venv-docs
TORCH ?= torch==2.13.0
PYTHON ?= python3.13 python3.12 python3.11 python3
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-warn-conflicts
empty :=
space := $(empty) $(empty)
TORCH_STAMP := $(VENV)/.stamp-$(subst =,-,$(subst /,-,$(subst :,-,$(subst $(space),-,$(TORCH)))))
TORCH_DEFAULT := $(if $(filter file,$(origin TORCH)),yes)

.PHONY: help demo test check chaos docs pictures install install-dev lint types imports budget format
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

demo: install
	$(BIN)/python run_helm.py $(ARGS)

test: install-dev
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

check: lint types imports budget

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev
	$(BIN)/mypy

imports: install-dev
	$(BIN)/lint-imports

budget: install-dev
	$(BIN)/python tests/code_budget.py

chaos: install-dev
	$(BIN)/python -m tests.chaos $(ARGS)

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What a page would load from outside (scripts, styles, fonts, pictures) is refused, too.
docs: $(DOCS_VENV)/.stamp
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet
	@if grep -rnE '<(script|link|img|iframe)[^>]*(src|href)="?(https?:)?//' --include='*.html' site; then \
	    echo "error: these pages would load something from outside" >&2; exit 1; \
	fi
	@echo "site/index.html"

pictures: install
	$(BIN)/python benchmarks/pictures.py $(ARGS)

install: $(VENV)/.stamp-runtime $(TORCH_STAMP)

install-dev: install $(VENV)/.stamp-dev

# An environment that is there and works is kept as it is: it may hold a torch of the user's choice.
$(VENV)/.stamp-venv:
	@usable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; \
	if $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    if ! $(BIN)/python -c "$$usable"; then \
	        echo "error: $(VENV) is older than Python 3.11: remove it and run make again" >&2; exit 1; \
	    fi; \
	else \
	    for python in $(PYTHON) none; do \
	        if [ "$$python" = none ]; then \
	            echo "error: none of '$(PYTHON)' is a Python 3.11 or newer with the venv and ensurepip modules:" \
	                 "install one (on Debian python3-venv too) or give it: make PYTHON=/path/to/python3.12" >&2; \
	            exit 1; \
	        fi; \
	        if "$$python" -c "$$usable" >/dev/null 2>&1; then break; fi; \
	    done; \
	    echo "making $(VENV) with $$python ($$($$python --version))"; \
	    "$$python" -m venv $(VENV); \
	fi
	@touch $@

# The pure Python sources among the pins are built with the pinned setuptools, not with today's newest.
$(VENV)/.stamp-runtime: requirements.lock | $(VENV)/.stamp-venv
	@echo "installing the packages of requirements.lock (a few minutes, once)"
	@$(PIP) --quiet --no-deps "$$(grep '^setuptools==' requirements.lock)"
	@$(PIP) --quiet --no-deps --no-build-isolation -r requirements.lock
	@touch $@

$(TORCH_STAMP): | $(VENV)/.stamp-runtime
	@if [ "$(TORCH_DEFAULT)" ] && $(BIN)/python -c 'import sys, torch; \
	    sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' 2>/dev/null; then \
	    echo "keeping the torch that $(VENV) has"; \
	else \
	    echo "installing $(TORCH)"; $(PIP) $(TORCH); \
	fi
	@touch $@

$(VENV)/.stamp-dev: requirements-dev.lock | $(VENV)/.stamp-runtime
	@echo "installing the packages of requirements-dev.lock"
	@$(PIP) --quiet --no-deps -r requirements-dev.lock
	@touch $@

$(DOCS_VENV)/.stamp: requirements-docs.lock | $(VENV)/.stamp-venv
	@echo "installing the packages of requirements-docs.lock"
	@$(BIN)/python -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -r requirements-docs.lock
	@touch $@
