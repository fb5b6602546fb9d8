# The two commands are `make book` and `make test`; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BENCH := .venv-bench
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CHAPTERS := $(wildcard book/*.ipynb)
# The chapters are tested in a folder of their own, one core each: nothing beside them is theirs.
ALONE := _build/alone

# Everything that tools write beside their results stays inside the tree.
HERE := $(CURDIR)/_build/home
export IPYTHONDIR := $(HERE)/ipython
export JUPYTER_CONFIG_DIR := $(HERE)/jupyter
export JUPYTER_DATA_DIR := $(HERE)/jupyter-data
export JUPYTER_RUNTIME_DIR := $(HERE)/jupyter-runtime
export MPLCONFIGDIR := $(HERE)/matplotlib
BOOK_TMP := $(HERE)/tmp

BUILD_BOOK = mkdir -p $(BOOK_TMP) && TMPDIR=$(BOOK_TMP) $(BIN)/jupyter-book build -W -n --keep-going --all

.DEFAULT_GOAL := help
.PHONY: help book html pdf test lint faults mutants soak bench pages lab chapters clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): constraints.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-cache-dir -c constraints.txt -e '.[bounds,export,lab,book,test]'
	@touch $@

book: $(READY) ## execute every chapter afresh and build the book from the result
	$(BIN)/python tools/notebooks.py execute --to _build/source
	$(BUILD_BOOK) _build/source --path-output .
	@echo "Open _build/html/index.html"

html: $(READY) ## build the book from the stored outputs, executing nothing
	$(BUILD_BOOK) .
	@echo "Open _build/html/index.html"

pdf: $(READY) ## print the built book as one PDF, with Chromium, and link it on the first page
	$(BIN)/python tools/pdf.py _build/html

lint: $(READY) ## static checks: ruff, types, floors, notebook normal form
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/notebooks.py check $(CHAPTERS)

test: lint ## static checks, the library's tests, and every chapter against its stored outputs
	rm -rf $(ALONE) && mkdir -p $(ALONE) && cp $(CHAPTERS) $(ALONE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not browser" \
	  --nbval --nbval-current-env --nbval-cell-timeout 120 \
	  --nbval-sanitize-with book/nbval_sanitize.cfg --junitxml=$(ALONE)/times.xml \
	  tests lipbook $(ALONE)
	$(BIN)/python tools/notebooks.py times $(ALONE)/times.xml

faults: $(READY) ## plant faults in a copy of the library and see the tests catch them
	$(BIN)/python tools/planted_faults.py

mutants: $(READY) ## change random places in a copy of the library and count what the tests see
	$(BIN)/python tools/mutants.py

soak: $(READY) ## measure ten thousand random networks against what the library promises
	$(BIN)/python -m lipbook reproduce soak --to _build/soak

bench: ## measure the layers beside their peers, in an environment of its own
	@test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --no-cache-dir -c constraints.txt -e '.[bench,lab]'
	$(BENCH)/bin/python -m benchmarks

pages: $(READY) ## in Chromium: every built page, the figures to touch, the drawings
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist load tests/test_pages.py \
	  tests/test_figures.py tests/test_figures_digits.py \
	  tests/test_plots.py::test_a_compact_drawing_looks_the_same

lab: $(READY) ## JupyterLab on the chapters
	$(BIN)/jupyter trust --log-level=WARN $(CHAPTERS)
	$(BIN)/jupyter lab book

chapters: $(READY) ## for authors: execute the chapters and store their outputs
	$(BIN)/python tools/notebooks.py execute --inplace $(CHAPTERS)

clean: ## remove what was built, keep the environment
	rm -rf _build
