# `make help` lists what there is. Everything is installed into $(VENV), nothing outside of it.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
export VENV

EXIT ?=
PORT ?= 8080
SCENARIOS ?= 10000
SEED ?= 0
DEMO_FLAGS = --port $(PORT) $(if $(filter-out 0,$(EXIT)),--exit)
# Side by side: tests of one process each, then those that start parts of their own; the rest shares
# hosts and engines. A file stays with one worker: pytest 9.2 makes xdist forget groups.
WORKERS ?= 3
SIDE_BY_SIDE = -n $(WORKERS) --dist loadfile
QUICK_TESTS = tests/unit tests/sim tests/contract
LIVE_TESTS = tests/integration
WHOLE_TESTS = tests/hosts tests/e2e tests/outside tests/gpu
TOOLS = debootstrap iproute2 systemd-container openssh-client curl wrk apache2-utils nginx-light
PYTEST_FLAGS ?=
VLLM_SOURCE ?=
REVISION ?=
VERSION ?=
DO ?=

.DEFAULT_GOAL := help
.PHONY: help setup setup-light up demo-stub test outside lint unit coverage sim bench house states wheel release lock clean

help: ## This list.
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: ## The environment with vLLM (the GPU or the CPU build) and all tools.
	scripts/setup.sh engine dev

setup-light: ## The same without an engine: enough for make lint and make unit.
	scripts/setup.sh base dev

up: ## Everything on this host with three tiny models, shown at work. EXIT=1 stops after; PORT=8080.
	scripts/setup.sh engine
	$(BIN)/stoker demo --engine vllm $(DEMO_FLAGS)

demo-stub: ## The same in seconds with the stub engine on a simulated device. EXIT=1, PORT=8080.
	scripts/setup.sh base
	$(BIN)/stoker demo --engine stub $(DEMO_FLAGS)

test: setup ## Every check and every test; says what was skipped, and why. WORKERS=3: quick tests at once.
	@scripts/install_consul.sh || printf '\n%s\n%s\n\n' \
	  '*** THERE IS NO CONSUL: the tests marked "consul" will be SKIPPED. ***' \
	  '*** The line above says why it could not be installed.            ***'
	@scripts/install_packages.sh $(TOOLS) || printf '\n%s\n%s\n\n' \
	  '*** A PACKAGE IS MISSING: tests of the Ansible playbook (tests/hosts too) will be SKIPPED. ***' \
	  '*** The line above says which, and why it could not be installed.                     ***'
	$(MAKE) --no-print-directory lint
	@failed=0; \
	$(BIN)/python -m pytest $(QUICK_TESTS) -m "not slow" -q -ra $(SIDE_BY_SIDE) $(PYTEST_FLAGS) || failed=1; \
	$(BIN)/python -m pytest $(LIVE_TESTS) -m "not slow" -q -ra $(SIDE_BY_SIDE) $(PYTEST_FLAGS) || failed=1; \
	$(BIN)/python -m pytest $(WHOLE_TESTS) -m "not slow" -ra $(PYTEST_FLAGS) || failed=1; \
	exit $$failed

outside: setup ## What others wrote: clients, tools, hosts; with VLLM_SOURCE=DIR vLLM's own tests too.
	scripts/setup.sh outside
	@scripts/install_packages.sh $(TOOLS) || echo '*** some tools are missing: their tests will be SKIPPED ***'
	STOKER_WRITE_CLIENTS_TABLE=1 $(BIN)/python -m pytest tests/outside tests/hosts -ra $(PYTEST_FLAGS)
	@if [ -n "$(VLLM_SOURCE)" ]; then $(BIN)/python -m tests.outside.vllm_http "$(VLLM_SOURCE)"; \
	else echo "SKIPPED vLLM's own HTTP tests: give an unpacked source archive of it as VLLM_SOURCE"; fi

lint: ## ruff and mypy.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: ## The quick tests only.
	$(BIN)/python -m pytest tests/unit -q $(SIDE_BY_SIDE) $(PYTEST_FLAGS)

coverage: setup-light ## What the tests within one process reach; triples their time, so not in make test.
	$(BIN)/python -m pytest tests/unit tests/sim -q --cov --cov-report=term $(SIDE_BY_SIDE) $(PYTEST_FLAGS)

sim: ## Random scenarios in virtual time, all rules checked. SCENARIOS=10000, SEED=0: the first.
	scripts/setup.sh base
	$(BIN)/python -m cli.simulate_many --count $(SCENARIOS) --first $(SEED)

bench: setup ## The benchmarks, one after the other.
	@for file in bench/*.py; do echo "== $$file"; $(BIN)/python "$$file" || exit 1; done

house: ## The floor plan in figures: folders, arrows, circles. REVISION=COMMIT: of an earlier one.
	@$(BIN)/python -m scripts.house $(REVISION)

states: ## The diagrams of docs/states.md, from the transition tables.
	$(BIN)/python -m scripts.state_diagrams

wheel: ## dist/stoker_serve-….whl
	scripts/setup.sh base
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist

release: ## VERSION=0.2.0: shows the release's commit and tag; with DO=1 makes them. Pushes nothing.
	@$(BIN)/python -m scripts.release "$(VERSION)" $(if $(filter-out 0,$(DO)),--do)

lock: ## Write the lock files in requirements/ from pyproject.toml.
	scripts/lock.sh

clean: ## Removes the environment, caches and the demo's state.
	rm -rf $(VENV) build dist .stoker .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
