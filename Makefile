# visionloop: `make` lists what there is. Needs Python 3.11 or 3.12, git and make; the rest goes into .venv.

PYTHON ?= $(shell for p in python3 python3.12 python3.11 python; do $$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
FITS   := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
BIN    := .venv/bin
STAMP  := .venv/.installed
COMPOSE := $(shell command -v docker-compose || echo docker compose) -f infra/compose.yaml --env-file infra/.env
CACHES := .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .dvc/cache .dvc/tmp

# No tool phones home. settings.py sets the same for every command; a contract test holds the two equal.
export DO_NOT_TRACK = true
export MLFLOW_DISABLE_TELEMETRY = true
export PREFECT_SERVER_ANALYTICS_ENABLED = false
export DVC_NO_ANALYTICS = 1
export RAY_USAGE_STATS_ENABLED = 0
export ORT_DISABLE_TELEMETRY = 1
# Tests and benchmarks keep the tools' caches in the workspace (uv's own stays where it is shared), and bytecode:
# where a shell forbids it, each worker and each command compiles all of this project again.
TIDY := PYTHONDONTWRITEBYTECODE= XDG_CACHE_HOME="$(CURDIR)/.visionloop/cache" MPLCONFIGDIR="$(CURDIR)/.visionloop/matplotlib"

# The stamp names the folder: after `mv`, or when the Python below is gone, the environment is made anew.
READY := $(shell [ "$$(cat $(STAMP) 2>/dev/null)" = "$(CURDIR)" ] && $(BIN)/python -c '' 2>/dev/null && echo yes)
ifneq ($(READY),yes)
$(STAMP): always
endif

.DEFAULT_GOAL := help
.PHONY: help install demo demo-loop test units test-long check fix lock docs bench clean env-team up-team down-team logs-team sbom always

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

install: $(STAMP) ## the environment, in .venv
	@echo ".venv is ready."

demo: $(STAMP) ## the whole loop on 1,797 handwritten digits: from images to a served model
	@$(BIN)/python flows/retrain.py

demo-loop: $(STAMP) ## drift, alarm, labels, retrain, swap, rollback, told step by step (two minutes)
	@$(BIN)/python flows/demo_loop.py

test: $(STAMP) ## check, then every test but the long ones
	@$(MAKE) --no-print-directory --jobs=2 check units
	@$(TIDY) $(BIN)/python -m pytest -n 3 -m "not long" --dist loadfile --no-loadscope-reorder tests --ignore=tests/unit

# Beside `check`: mypy takes half a minute, on one core.
units: $(STAMP)
	@$(TIDY) $(BIN)/python -m pytest -n 2 -m "not long" tests/unit

test-long: $(STAMP) ## the slow repetitions that `make test` leaves out: other ends, Ray, all backbones
	@$(TIDY) $(BIN)/python -m pytest -n 2 -m long --dist loadfile --no-loadscope-reorder tests

check: $(STAMP) ## lint, format, types, import rules, dead code, code.json
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "Not formatted (above). Run \`make fix\`." >&2; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo >.venv/lint-imports.txt 2>&1 || { cat .venv/lint-imports.txt >&2; exit 1; }
	@$(BIN)/vulture >.venv/vulture.txt || [ $$? -eq 3 ] # 3: found something; fields and keys are no finding
	@! grep -E 'unused (class|function|method|property|import)|unreachable' .venv/vulture.txt >&2
	@$(BIN)/python -m visionloop.pipeline --check
	@echo "check: all good"

fix: $(STAMP) ## mend what can be mended: lint, format, code.json
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format --quiet .
	@$(BIN)/python -m visionloop.pipeline

lock: $(STAMP) ## requirements.lock from pyproject.toml (UPGRADE=--upgrade for the newest versions)
	@$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --custom-compile-command "make lock" --quiet $(UPGRADE) -o requirements.lock
	@echo "requirements.lock is written. Run \`make install\` to install it."

docs: $(STAMP) ## docs/ as a site, in site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "site/index.html is written."

bench: $(STAMP) ## the hot paths against plain baselines, as one table
	@$(TIDY) $(BIN)/python benchmarks/run.py

env-team: ## infra/.env, with new secrets for the team's stack; one that is there stays
	@infra/env.sh infra/.env

up-team: ## the team's stack in containers: PostgreSQL, S3, MLflow, Prefect, servers, Prometheus (infra/team.md)
	@[ -f infra/.env ] || { echo "make: infra/.env is not there; expected the secrets of the stack. Run \`make env-team\`." >&2; exit 2; }
	@infra/up.sh $(COMPOSE)

down-team: ## stop it; what it holds stays in its volumes
	@$(COMPOSE) down

logs-team: ## what its containers say, as they say it
	@$(COMPOSE) logs --follow --tail 100

sbom: ## what an image holds, as CycloneDX: make sbom IMAGE=visionloop-serve >sbom.json
	@[ -n "$(IMAGE)" ] || { echo "make: IMAGE is not set; expected an image. Run \`make sbom IMAGE=visionloop-serve\`." >&2; exit 2; }
	@docker run --rm --interactive --network none "$(IMAGE)" python - <infra/docker/sbom.py

clean: ## remove all that was made here: prepared data, models, reports, store, champion (not .venv, not the pin)
	@rm -rf .visionloop data/prepared features suspects models reports decisions site $(CACHES)
	@find src flows tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Without a stamp .venv is absent or half made, and is made from nothing; a stale one is only brought up to date.
$(STAMP): requirements.lock pyproject.toml
	@[ -n "$(PYTHON)" ] && "$(PYTHON)" -c '$(FITS)' || { echo "make: no Python 3.11 or 3.12 found; expected one on PATH." \
		"Install it, or name it: make install PYTHON=/path/to/python3.11" >&2; exit 2; }
	@rm -f $@
	@[ "$(READY)" = yes ] || { echo "Making .venv: one to two minutes, 6 GB with CUDA torch ..."; \
		"$(PYTHON)" -m venv --clear .venv; }
	@$(BIN)/uv --version >/dev/null 2>&1 || { awk '/^uv==/ {p = 1} p {print} p && !/\\$$/ {exit}' requirements.lock \
		>.venv/uv.txt && $(BIN)/python -m pip install --no-cache-dir -q --require-hashes -r .venv/uv.txt; }
	@$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@echo "$(CURDIR)" >$@
