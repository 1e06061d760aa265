# Every target sets itself up: a virtual environment with the pinned dependencies of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A busy neighbour core slows spinning OpenMP threads many times over; waiting threads it does not.
export OMP_WAIT_POLICY := PASSIVE
# What is compiled once, tests with their assertions too, is kept for the next time, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: table1 lint check test campaign report clean

table1: $(VENV)/ready            ## the main job: Table 1 on the embedded default
	$(BIN)/mode reproduce table1

lint: $(VENV)/ready              ## format, lint, types, layers, spelling
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/mypy
	$(BIN)/lint-imports > .lint-imports.log || { cat .lint-imports.log; exit 1; }
	$(BIN)/codespell

check: lint                      ## the quick round: lint and fast tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test: lint $(VENV)/downstream    ## the whole suite, and the committed tables against their records
	$(BIN)/mode report --check paths.results=results
	$(BIN)/python -m pytest -n 2 --dist worksteal

campaign: $(VENV)/ready          ## faults on purpose, about 15 minutes; goes on where it was (docs/reliability.md)
	$(BIN)/python -m tests.campaign

report: $(VENV)/ready            ## render the published tables anew from their records
	$(BIN)/mode report paths.results=results

$(VENV)/ready: setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(VENV)/ready

# lm-evaluation-harness and trainers to compare with bring dozens of packages, which only their tests need.
$(VENV)/downstream: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[downstream,peers,submitit]'
	touch $(VENV)/downstream

clean:                           ## remove what the targets made, but for runs/ and results/
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .campaign
