# Everything installs into .venv of this folder; nothing else of the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/demo
DEMO_ARGS ?=

.PHONY: demo test test-app lint format clean

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

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not network"

# The app's page and a visit in a browser, in an environment of their own: Gradio wants an older Pillow than the rest.
APP := .venv-app
$(APP)/.app: setup.py constraints.txt constraints-app.txt
	$(PYTHON) -m venv $(APP)
	grep -vi '^pillow==' constraints.txt | cat - constraints-app.txt > $(APP)/constraints.txt
	$(APP)/bin/python -m pip install --constraint $(APP)/constraints.txt --editable ".[app]" playwright pytest
	touch $@

test-app: $(APP)/.app
	OMP_NUM_THREADS=1 $(APP)/bin/python -m pytest tests/test_app.py tests/test_app_browser.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(APP) build dist *.egg-info
