# Every command of the project; `make` alone lists them.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
# PYTHONPATH lets scripts/ and benchmarks/ import the packages from wherever make was called.
export PYTHONPATH := $(CURDIR)

.DEFAULT_GOAL := help
# Not a list of names that all add to: every target without a file's name.
.PHONY: $(shell grep -oE '^[a-z][a-z-]*:' $(firstword $(MAKEFILE_LIST)) | tr -d :)

help: ## List the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: ## Make the virtual environment, or bring it up to date
	@$(PYTHON) scripts/environment.py $(VENV)

# MLflow's server pins older packages than ours, so it stands apart.
mlflow: install ## Install the MLflow server that tests speak to
	@test -x $(VENV)/mlflow/bin/mlflow || \
	  { $(PYTHON) -m venv $(VENV)/mlflow && $(VENV)/mlflow/bin/pip install -q --disable-pip-version-check mlflow==3.17.2; }

demo: install ## Prune a real model through the real service, three ways
	@$(BIN)/python scripts/demo.py

up: install ## Run the service on this machine until Ctrl-C
	@$(BIN)/secateur up

test: install mlflow ## Run every test, the demo model's included
	@$(BIN)/pytest

test-fast: install ## Run the tests but those of the demo model
	@$(BIN)/pytest -m 'not real_model'

state-machine: install ## Drive the life of jobs through 2 000 random runs on SQLite and on PostgreSQL (SEED=…; about 20 minutes)
	@SECATEUR_STATE_MACHINE_RUNS=$(or $(RUNS),2000) $(BIN)/pytest tests/api/test_state_machine.py --hypothesis-seed=$(or $(SEED),0)

bench-engine: install ## Time the engine beside llm-compressor on the demo model (`make demo` makes it)
	@$(BIN)/python -m benchmarks.engine

bench-elastic: install ## Cost and perplexities of an elastic model beside single-rate methods, on the demo model
	@$(BIN)/python -m benchmarks.elastic

bench-energy: install ## Seconds of energy compensation as a share of a forward, on a machine that does nothing else
	@$(BIN)/python -m benchmarks.energy

bench-estimate: install ## Say what jobs will cost, run them on the demo model, and compare
	@$(BIN)/python -m benchmarks.estimate

bench-induction: install ## Time an epoch of Sparsity Induction, and its refresh, on a machine that does nothing else
	@$(BIN)/python -m benchmarks.induction

bench-memory: install ## Show that memory does not grow with depth, on a generated model of 4 GB
	@$(BIN)/python -m benchmarks.memory

METHODS ?=
SPARSITIES ?= 0.5 0.6 0.7 2:4 4:8
bench-quality: install ## Perplexity of METHODS at SPARSITIES on the demo model; rows that are known are not measured again
	@$(BIN)/python -m benchmarks.quality --methods "$(METHODS)" --sparsities "$(SPARSITIES)"

bench-seconds: install ## Seconds of METHODS as multiples of Wanda's, on a machine that does nothing else
	@$(BIN)/python -m benchmarks.seconds --methods "$(METHODS)"

bench-streams: install ## Hold 500 event streams open on one API process (SECONDS=600 for ten minutes)
	@$(BIN)/python -m benchmarks.streams --seconds $(or $(SECONDS),120)

chaos: install ## Beat the whole service at every stage of its jobs, and judge what comes of them (about 10 minutes)
	@$(BIN)/python -m benchmarks.chaos

check: install ## Lint, types, directions of import, containers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/hadolint Dockerfile
	@$(BIN)/compose-lint check -q --no-env docker-compose.yml
	@if docker compose version >/dev/null 2>&1; then \
	  POSTGRES_PASSWORD=x VALKEY_PASSWORD=x docker compose config --quiet; fi

format: install ## Rewrite the code in the house's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

openapi: install ## Write openapi.json from the code
	@$(BIN)/python -m app.openapi

constraints: ## Pin what is installed now
	@$(BIN)/pip freeze --all --exclude-editable | sed -E 's/^(torch==[^+]*)\+.*/\1/' > constraints.txt

clean: ## Remove the virtual environment and all local state
	rm -rf $(VENV) .secateur
