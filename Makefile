PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := $(VENV)/.extras
LOWEST := .venv-lowest
ZOO := .venv-zoo
SITE := $(VENV)/.docs
PEERS := .venv-bench
WORKERS ?= 2
PIP := -m pip install -q --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install docs docs-serve docs-links figures demo test test-slow test-docs test-fuzz test-zoo test-lowest lint format bench bench-exports reproduce clean

help: ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(PIP) -c constraints.txt -e .
	@touch $@

$(EXTRAS): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(PIP) -c constraints.txt -e '.[dev]'
	@touch $(STAMP) $@ # what the demo needs is among it

install: $(EXTRAS) ## Create .venv and install the pinned versions into it, extras and tools for development included

demo: $(STAMP) ## Train on digits to 90 % sparsity, and say where the plots are
	$(BIN)/python train.py

test: install ## Run the tests (the slow ones excepted)
	$(BIN)/pytest

test-docs: install ## Run the commands of the documentation, and compare its table of figures
	$(BIN)/pytest -m docs --timeout 1800 tests/test_documented.py tests/test_site.py tests/test_contributing.py tests/test_own.py

test-slow: install ## Run the slow tests
	$(BIN)/pytest -m slow

test-fuzz: install ## Train 3,000 random small models with random settings (FUZZ=100 FUZZ_SEED=1: 100 others)
	FUZZ=$${FUZZ:-3000} FUZZ_SEED=$${FUZZ_SEED:-0} $(BIN)/pytest -n 0 -s tests/test_fuzz.py

$(LOWEST)/.installed: pyproject.toml .ci/lowest.py
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python .ci/lowest.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python $(PIP) -c $(LOWEST)/constraints.txt -e . $$(grep -E '^(pytest|pytest-xdist|pytest-timeout|hypothesis)==' constraints.txt)
	@touch $@

test-lowest: $(LOWEST)/.installed ## Run the tests that need no extra with the lowest versions of the dependencies
	$(LOWEST)/bin/pytest -n 0 -W default --without-extras tests

$(ZOO)/.installed: pyproject.toml constraints.txt tests/zoo/requirements.txt
	$(PYTHON) -m venv $(ZOO)
	$(ZOO)/bin/python $(PIP) -c constraints.txt -e '.[transformers,quantize,export,sweep,ray]' $$(grep -E '^(pytest|pytest-xdist|pytest-timeout|hypothesis)==' constraints.txt)
	$(ZOO)/bin/python $(PIP) --no-deps -c constraints.txt -r tests/zoo/requirements.txt
	@touch $@

test-zoo: $(ZOO)/.installed ## Train modules of other packages to be sparse and in integers, remove channels, and write docs/zoo*.md
	$(ZOO)/bin/pytest tests/zoo -m "" --zoo-table docs/zoo.md --removal-table docs/zoo_removal.md --int8-table docs/zoo_int8.md

lint: install ## Check format, lint, words, types, the order of imports and the declared dependencies
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python .ci/words.py
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry pl_sparse

format: install ## Format the code, and fix what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(SITE): $(EXTRAS)
	$(BIN)/python $(PIP) -c constraints.txt -e '.[dev,docs]'
	@touch $@

docs: $(SITE) ## Build the site: docs/_build/html/index.html opens from disk
	$(BIN)/python -m sphinx -W --keep-going -q -j $(WORKERS) -b html docs docs/_build/html

docs-serve: docs ## Build the site and show it on http://localhost:8000
	$(BIN)/python -m http.server 8000 --bind 127.0.0.1 --directory docs/_build/html

docs-links: $(SITE) ## Check the links to other sites, which needs a network; the build does not do it
	$(BIN)/python -m sphinx -q -j $(WORKERS) -b linkcheck -D plot_gallery=0 docs docs/_build/linkcheck

figures: install ## Draw the figures of the site anew
	@for script in one_step masks schedules which_method methods fashion targets payoff growth cards; do $(BIN)/python docs/figures/$$script.py || exit 1; done

$(PEERS)/.installed: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(PIP) -c constraints.txt -e '.[export,quantize]'
	$(PEERS)/bin/python $(PIP) --no-deps -r benchmarks/requirements.txt
	@touch $@

bench: $(PEERS)/.installed ## Measure what masks cost beside other libraries, in 15 minutes on two cores, and write docs/performance.md
	@for script in step topk update costs; do echo "== $$script"; $(PEERS)/bin/python benchmarks/$$script.py --json docs/data/$$script.json || exit 1; done
	$(PEERS)/bin/python benchmarks/update.py --millions 85 --json docs/data/update85.json
	$(PEERS)/bin/python benchmarks/report.py
	$(PEERS)/bin/python docs/figures/growth.py

bench-exports: $(PEERS)/.installed ## Measure what is gained from zeros: audits, exported models, predicted latency, shrinking
	@for script in audit export latency shrink; do echo "== $$script"; $(PEERS)/bin/python benchmarks/$$script.py || exit 1; done

reproduce: install ## Run the published experiments (resumable) and write docs/reproductions.md
	$(BIN)/python -m benchmarks.reproduce

clean: ## Remove the virtual environment, caches and build outputs
	rm -rf $(VENV) $(LOWEST) $(ZOO) $(PEERS) docs/_build docs/generated docs/tutorials examples/outputs build dist *.egg-info .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
