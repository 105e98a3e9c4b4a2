# Everything installs into .venv of this folder; nothing else of the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/demo
DEMO_ARGS ?=

.PHONY: demo readme test lint docs dist format clean

$(VENV)/.demo: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.demo
	$(BIN)/drum-hf demo --out $(OUT) $(DEMO_ARGS)

# README's table and pictures, from the demo's output.
readme: demo
	$(BIN)/python -m drum_hf.experiments.readme $(OUT) README.md

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: lint docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not network"

# What would be uploaded, checked and tried in an environment of its own; RELEASING.md has the steps.
dist: $(VENV)/.dev
	rm -rf dist build
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/check_dist.py dist
	sh tests/try_wheel.sh $(PYTHON) dist/*.whl constraints.txt

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
