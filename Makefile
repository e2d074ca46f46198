# Needs make and Python 3.11 or newer; everything else goes into a virtual environment in .venv,
# as locked, with hashes, in requirements.txt (to run) and requirements-dev.txt (to test as well).
#
# VENV=folder puts the environment elsewhere, PYTHON=path picks the Python for a new one,
# ARGS="…" is added to the command of run, demo, migrate, test, bench, chaos and lock.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
PYTHON ?=
ARGS :=
WORKERS := 2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq
FLEXRUN := $(PY) -m app.cli.main
COVERAGE := $(PY) -m coverage
LOCK := uv pip compile --universal --python-version 3.11 --generate-hashes --no-header \
	--no-annotate --no-emit-index-url --no-emit-find-links --quiet

# The environment of the caller may not lead Python or pip out of the virtual environment.
unexport PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIREMENT PIP_NO_DEPS

##@ Use it

.PHONY: demo
demo: $(VENV)/.run ## Run the service on a Postgres of its own and stream a real run over README.md
	@$(FLEXRUN) demo README.md $(ARGS)

.PHONY: run
run: $(VENV)/.run ## Serve on 127.0.0.1:8000 (ARGS="--port 9000")
	@$(FLEXRUN) serve $(ARGS)

.PHONY: migrate
migrate: $(VENV)/.run ## Bring the database at DATABASE_URL to the newest schema
	@$(FLEXRUN) migrate $(ARGS)

##@ Work on it

.PHONY: install
install: $(VENV)/.dev ## Make the virtual environment with everything that tests and lint need

.PHONY: test
test: $(VENV)/.dev ## Run all tests on real Postgres and Redis, and hold the coverage floors
	@$(COVERAGE) erase
	@$(COVERAGE) run -m pytest -n $(WORKERS) --dist worksteal --junitxml build/test-results/junit.xml $(ARGS)
	@$(COVERAGE) combine --quiet
	@$(COVERAGE) report --fail-under 90 --format total >/dev/null \
		|| { $(COVERAGE) report; echo "coverage of app/ is below 90 %" >&2; exit 1; }
	@$(COVERAGE) report --fail-under 100 --include 'app/domain/*,app/planner/*'

.PHONY: cover
cover: $(VENV)/.dev ## Show the coverage of the last `make test`, line by line, as pages in build/coverage/
	@$(COVERAGE) report
	@$(COVERAGE) html --directory build/coverage

.PHONY: check
check: $(VENV)/.dev ## Lint, format, types, import directions, locks
	@failed=0; \
	for tool in "-m ruff check ." "-m ruff format --check ." "-m mypy" \
		"$(VENV)/bin/lint-imports --no-logo" \
		"-m pytest -q -p no:cacheprovider tests/unit/test_requirements.py"; do \
		echo "== $$tool"; $(PY) $$tool || failed=1; \
	done; exit $$failed

.PHONY: fix
fix: $(VENV)/.dev ## Format, repair what lint can repair, write what is generated
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .
	@mkdir -p build
	@$(PY) -m tests.unit.test_env_example >build/env-example && mv build/env-example .env.example
	@$(PY) -m docs.generate

.PHONY: bench
bench: $(VENV)/.dev ## Measure it on this machine
	@$(PY) -m bench $(ARGS)

.PHONY: chaos
chaos: $(VENV)/.dev ## Break everything and judge what is left (ARGS="--seed 7 --size full")
	@$(PY) -m tests.chaos $(ARGS)

.PHONY: lock
lock: ## Resolve requirements*.in again, keeping pins (ARGS=--upgrade does not; needs uv)
	@$(LOCK) $(ARGS) requirements.in --output-file requirements.txt
	@$(LOCK) $(ARGS) requirements-dev.in --output-file requirements-dev.txt

.PHONY: clean
clean: ## Remove the virtual environment and what tools left behind
	@rm -rf .venv build dist .coverage .coverage.* *.egg-info
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find app tests migrations -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help
help: ## Show this
	@awk -F ':.*## ' '/^##@/ { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

# The virtual environment. An environment whose Python is gone is made anew. Pythons with wheels for
# everything come first: the redis-server of the tests has none for 3.13.

PYTHONS := $(if $(PYTHON),"$(PYTHON)",python3.12 python3.11 python3.13 python3.14 python3 python)

.PHONY: again
again:

$(VENV)/.made: $(if $(wildcard $(VENV)/.made),$(shell "$(PY)" -c '' 2>/dev/null || echo again))
	@found=; unusable=; \
	for python in $(PYTHONS); do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
		"$$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || { unusable=$$python; continue; }; \
		found=$$python; break; \
	done; \
	if [ -n "$$found" ]; then \
		echo "Making $(VENV) with $$("$$found" --version)" && \
		"$$found" -m venv $$(test ! -e "$(VENV)/pyvenv.cfg" || echo --clear) "$(VENV)"; \
	elif [ -n "$$unusable" ]; then \
		echo "$$unusable cannot make a virtual environment: it lacks ensurepip." >&2; \
		echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	else \
		echo "Flexrun needs Python 3.11 or newer, and none of these is one: $(PYTHONS)" >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.12 …" >&2; exit 1; \
	fi
	@touch "$@"

$(VENV)/.run: requirements.txt $(VENV)/.made
	@echo "Installing what Flexrun runs on (requirements.txt)"
	@$(PIP) install --require-hashes --requirement requirements.txt
	@test ! -w . || $(PIP) install --no-deps --no-build-isolation --editable .
	@test ! -w . || $(PY) -m compileall -q app
	@touch "$@"

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	@echo "Installing what its tests need on top (requirements-dev.txt)"
	@$(PIP) install --require-hashes --requirement requirements-dev.txt
	@touch "$@"
