# `make demo` and `make test` are the two to know; each sets up all that it needs.
# ARGS goes to minitron or to a benchmark, PYTEST_ARGS to pytest, PIP_ARGS to pip: where the package index has
# no CPU build of torch, PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" saves several GB.

SHELL := /bin/bash
BIN := .venv/bin
STAMP := .venv/.stamp-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
TEST_ENV := HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
PYTEST := $(BIN)/python -m pytest -q

.DEFAULT_GOAL := help
.PHONY: help setup demo controls demo-teacher test test-slow test-cluster test-gpu lint types arch check clean

help:  ## this list
	@sed -n 's/^\([a-z%-]*\):.*## /\1\t/p' Makefile | expand -t 14

setup: $(STAMP)  ## make .venv with everything in it (nothing to do when it is up to date)

# The stamp is named after what was asked for, and comes last: a set-up that was cut short is taken up again.
$(STAMP):
	@set -e; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    python=; \
	    for name in python3.11 python3.12 python3; do \
	        if $$name -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then \
	            python=$$name; break; \
	        fi; \
	    done; \
	    if [ -z "$$python" ]; then \
	        echo "make setup: needs Python 3.11 or 3.12, found $$(python3 --version 2>/dev/null || echo none)" >&2; exit 2; \
	    fi; \
	    if ! $$python -m venv --clear .venv >/dev/null 2>&1; then \
	        echo "make setup: '$$python -m venv' failed; on Debian or Ubuntu: apt-get install $$($$python -c \
	            'import sys; print("python%d.%d-venv" % sys.version_info[:2])') (or python3-venv)" >&2; exit 2; \
	    fi; \
	fi
	@echo "make setup: installing into .venv (1 to 10 minutes, about 2 GB)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt $(PIP_ARGS)
	@rm -f .venv/.stamp-* && touch $@

demo: setup  ## prune the embedded teacher, distill it back, write outputs/demo/report.html
	$(BIN)/minitron experiment=demo $(ARGS)

controls: setup  ## the demo and its controls: without a teacher, and from random weights (up to an hour)
	$(BIN)/minitron experiment=demo 'controls=[scratch,ce,scratch_until]' $(ARGS)

demo-teacher: setup  ## train the embedded teacher again
	$(BIN)/minitron experiment=demo_teacher $(ARGS)

test: setup  ## the tests, without those marked slow or gpu
	$(TEST_ENV) $(PYTEST) -n 2 --no-loadscope-reorder -m 'not slow and not gpu' $(PYTEST_ARGS)

test-slow: setup  ## the tests marked slow
	$(TEST_ENV) $(PYTEST) -m 'slow and not gpu' $(PYTEST_ARGS)

test-cluster: setup  ## the tests on a two-node Slurm that they bring up on this machine (root; installs Debian's packages)
	$(TEST_ENV) $(PYTEST) tests/cluster $(PYTEST_ARGS)

test-gpu: setup  ## the tests that need a GPU
	HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES-0} $(PYTEST) -m gpu $(PYTEST_ARGS)

lint: setup  ## ruff
	$(BIN)/ruff check .

types: setup  ## mypy on the package
	$(BIN)/mypy

arch: setup  ## who may import whom
	$(BIN)/lint-imports

check: lint types arch test  ## what CI runs

bench-%: setup
	$(BIN)/python benchmarks/$*.py $(ARGS)

clean:  ## remove caches, not .venv and not outputs
	rm -rf .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis build *.egg-info
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
