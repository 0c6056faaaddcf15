# Every target sets up .venv by itself, with the tested versions of constraints.txt.
PYTHON ?= python3
SEEDS  ?= 1
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test digits soak mutants docs lab app bench export clean
.DEFAULT_GOAL := demo

$(READY): constraints.txt settings.ini setup.py pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11, 4), "aevlp needs Python 3.11.4 or newer; name one: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	@echo "Installing torch, open_clip, JupyterLab and the rest into $(VENV): some minutes, about 6 GB ..."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name "Python 3 (aevlp)" > /dev/null
	touch $@

demo: $(READY)   ## the whole method on the embedded benchmark: pictures in figures/glyphs/, runs in runs/
	$(BIN)/aevlp demo --seeds $(SEEDS)

test: $(READY)   ## every notebook and every test
	$(BIN)/python -m pytest -n 2 -m "not slow"

digits: $(READY) ## the expected digits of the embedded benchmark, for 1, 2 and 4 threads
	$(BIN)/python -m pytest tests/test_digits.py

soak: $(READY)   ## kill tests and the 200-run sweep; their figures in benchmarks/soak.json
	$(BIN)/python -m pytest -m slow -s

mutants: $(READY) ## small changes to twelve modules, each of which the module's tests have to notice
	$(BIN)/python tests/mutants.py $(MODULES)

docs: $(READY)   ## the site, in docs/_build/html
	$(BIN)/python docs/build.py site

lab: $(READY)    ## JupyterLab on the explorer
	$(BIN)/aevlp lab

app: $(READY)    ## the explorer as a page of its own
	$(BIN)/aevlp app

bench: $(READY)  ## speed, as ratios against the textbook pipeline
	$(BIN)/python benchmarks/run.py

export: $(READY) ## notebooks -> aevlp/, README.md
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python docs/build.py readme

clean:
	rm -rf $(VENV) build dist *.egg-info _proc docs/_build .pytest_cache .ruff_cache
