# Two commands from a fresh clone do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# nothing phones home
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1
export WANDB_MODE := disabled

.PHONY: help install demo test test-all test-processors test-mlflow browser lint bench calibrate soak clean

help:
	@echo "make demo   install into $(VENV), simulate, train, register, evaluate, compare with what was planted"
	@echo "make test   install and run the tests, without those that take long, in two processes"
	@echo "make test-all  run all tests, as CI does; with CI=true, make browser first"
	@echo "make test-processors  run the tests of numbers as other processors would, with 1 and 2 threads: each about as long as those tests"
	@echo "make test-mlflow MLFLOW=3.8  run the tests of what is tracked with another MLflow, in an environment of its own"
	@echo "make browser  install Chromium and its driver with apt-get, for the tests that open pages: else they are skipped"
	@echo "make lint   install and run ruff, mypy and import-linter"
	@echo "make bench  measure speed and memory beside amici-st and write docs/performance.md: about 25 min"
	@echo "make calibrate  measure type I error, power and coverage and write docs/validity.md: about 18 min"
	@echo "make soak   inject 200 faults into real evaluations and look for anything lost: under 15 min"
	@echo "make clean  remove what the above made"

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "$$($(PYTHON) --version) found, Python 3.10 to 3.12 needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,sweep,ray]'
	@touch $@

demo: install
	$(BIN)/amici-eval demo
	@echo "(amici-eval and mlflow are in $(BIN); activate it with: source $(BIN)/activate)"

# two processes of one thread each, all tests of a file in the same; PARALLEL= runs all in one process
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder
PYTEST = $(if $(PARALLEL),OMP_NUM_THREADS=1) $(BIN)/python -m pytest $(PARALLEL)
test: install
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: install $(if $(filter true,$(CI)),browser)
	$(PYTEST) $(PYTEST_ARGS)

# PROCESSORS="zen reordered-1" chooses settings, PROCESSOR_TESTS="tests/stats" tests
test-processors: install
	PROCESSOR_TESTS="$(PROCESSOR_TESTS)" $(BIN)/python -m tests.processors $(PROCESSORS)

# constraints.txt first, then the other MLflow with an SQLAlchemy that old ones can use; its warnings are its own
MLFLOW ?= 3.17
OTHER := $(VENV)-mlflow-$(MLFLOW)
test-mlflow:
	$(MAKE) install VENV=$(OTHER)
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check 'mlflow==$(MLFLOW).*' 'sqlalchemy<2.1'
	$(OTHER)/bin/python -m pytest -W default tests/tracking tests/cli/test_cli.py $(PYTEST_ARGS)

# selenium and axe-core come with the dev extra; without a browser the tests that need one are skipped and say so
SUDO = $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
BROWSER = $(if $(wildcard /usr/bin/chromium),,chromium) $(if $(wildcard /usr/bin/chromedriver),,chromium-driver)
browser: install
	@if [ -z "$(strip $(BROWSER))" ]; then echo "Chromium and its driver are there"; \
	elif command -v apt-get >/dev/null; then \
	  { $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(BROWSER); } \
	  || echo "$(strip $(BROWSER)) could not be installed: tests that open pages are skipped" >&2; \
	else echo "no apt-get to install $(strip $(BROWSER)) with: tests that open pages are skipped" >&2; fi

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: install
	$(BIN)/python -m tests.benchmarks $(BENCH_ARGS)

calibrate: install
	$(BIN)/python -m tests.calibration $(CALIBRATE_ARGS)

soak: install
	$(BIN)/python -m tests.soak $(SOAK_ARGS)

clean:
	rm -rf $(VENV) $(VENV)-mlflow-* demo-output benchmark-results calibration-results amici-eval-results mlflow.db mlruns build dist .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
