# Needs Python 3.11 or newer, git and make; everything else is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
BENCH_ARGS ?=
# `.ci/unpack-mysql FOLDER` fetches one on a Debian that has none.
MYSQLD ?= mysqld
SECONDS_OF_CHAOS ?= 1200
FLOOD ?= 60000
TRANSFERS ?= 10000
KILLS ?= 5000
CRASHES ?= 20
# In memory: processes are killed, not the machine, and a disk would be what all of it waits for.
CRASH_DISK ?= $(firstword $(wildcard /dev/shm /tmp))
FUNCTION_COMMANDS ?= 10000
FUZZ_SECONDS ?= 120
FUZZED ?= message outcome event stored command cursor http arguments
MYSQL_SUITES := tests/contract tests/acceptance tests/integration/test_mysql_store.py \
	tests/integration/test_server_stores.py
# What the versions of libraries can break: stores, brokers, codecs, the command line.
RANGE_SUITES := tests/unit tests/contract tests/acceptance tests/deployment/test_dependencies.py \
	tests/integration/test_cli_preparing.py tests/integration/test_cli_inspecting.py \
	tests/integration/test_amqp_service.py tests/integration/test_tracing.py
.DEFAULT_GOAL := help
.PHONY: help demo test test-mysql test-lowest test-newest crashes faults deploys proofs bench \
	bench-against growth fuzz recipes containers serverless check format schemas upgrade audit sbom secrets clean

help:  ## show what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

demo: $(VENV)/.installed  ## run the bank on a fresh SQLite file: commands in, views out
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	CQRS_ES_STORE_URL="sqlite:///$$folder/bank.db" \
	$(BIN)/cqrs-es run --commands examples/bank.jsonl --until-idle

test: $(VENV)/.installed  ## run every test; those without their server are skipped
	$(BIN)/pytest $(PYTEST_ARGS)

test-mysql: $(VENV)/.installed  ## run the store's suites on MySQL itself: MYSQLD=program, or CQRS_ES_TEST_MYSQL_URL
	CI=true CQRS_ES_TEST_MYSQLD=$(MYSQLD) $(BIN)/pytest $(MYSQL_SUITES) -k mysql $(PYTEST_ARGS)

test-lowest: $(VENV)/.installed  ## run the suites on the lowest versions that the wheel allows
	$(BIN)/uv pip compile --quiet --extra all --resolution lowest-direct pyproject.toml \
		--output-file $(VENV)/lowest.txt
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VENV)/lowest
	$(BIN)/uv pip install --quiet --python $(VENV)/lowest --constraint $(VENV)/lowest.txt \
		--editable ".[dev]"
	$(VENV)/lowest/bin/pytest $(RANGE_SUITES) $(PYTEST_ARGS)

test-newest: $(VENV)/.installed  ## run the suites on the newest versions that there are
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VENV)/newest
	$(BIN)/uv pip install --quiet --python $(VENV)/newest --editable ".[dev]"
	$(VENV)/newest/bin/pytest $(RANGE_SUITES) $(PYTEST_ARGS)

crashes: $(VENV)/.installed  ## kill processes at each instant that matters, 20 times each, on SQLite, DynamoDB and four pairs of servers
	CI=true CQRS_ES_TEST_CRASHES=$(CRASHES) TMPDIR=$(CRASH_DISK) \
		$(BIN)/pytest tests/faults/test_crash_points.py --numprocesses=4 -rA $(PYTEST_ARGS)

faults: $(VENV)/.installed  ## a flood of commands; an hour of chaos: 20 minutes on each of three pairs of servers
	CI=true CQRS_ES_TEST_FLOOD=$(FLOOD) $(BIN)/pytest tests/faults/test_deaths.py -k flood_of_commands $(PYTEST_ARGS)
	CI=true CQRS_ES_TEST_CHAOS_SECONDS=$(SECONDS_OF_CHAOS) $(BIN)/pytest tests/faults/test_chaos.py \
		--log-cli-level=WARNING $(PYTEST_ARGS)

proofs: $(VENV)/.installed  ## at size: transfers under kills, races, clocks, unique values, rates; what idle services ask
	CI=true CQRS_ES_TEST_TRANSFERS=$(TRANSFERS) CQRS_ES_TEST_KILLS=$(KILLS) CQRS_ES_TEST_RACES=10000 \
		CQRS_ES_TEST_REGISTRATIONS=1000 CQRS_ES_TEST_REGISTERING=64 CQRS_ES_TEST_KEY_KILLS=30 \
		CQRS_ES_TEST_IDLE=1 \
		$(BIN)/pytest tests/faults/test_transfers.py tests/contract/test_scheduled.py \
		tests/integration/test_causing.py tests/integration/test_unique_keys.py \
		tests/integration/test_idle.py \
		-k "kills or decided_or_cancelled or clock or hour_without or g12 or nothing_to_do" \
		--timeout=7200 --log-cli-level=WARNING $(PYTEST_ARGS)
	$(BIN)/python -m benchmarks.scheduled

bench: $(VENV)/.installed  ## what a command costs: by the queue, by HTTP, one at a time; and what following the log costs
	$(BIN)/python -m benchmarks.one_at_a_time $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.queue $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.following $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.latency $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.http $(BENCH_ARGS)

growth: $(VENV)/.installed  ## what becomes of speed and memory with a million rows and 300,000 aggregates
	$(BIN)/python -m benchmarks.growth $(BENCH_ARGS)

bench-against: $(VENV)/.installed  ## the same of this tree and of another commit, in turns: REV=commit
	$(BIN)/python -m benchmarks.one_at_a_time --against $(REV) $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.queue --against $(REV) $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.following --against $(REV) $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.latency --against $(REV) $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.http --against $(REV) $(BENCH_ARGS)

fuzz: $(VENV)/.installed  ## give odd bytes to all that reads others' bytes: FUZZ_SECONDS=120 for each
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VENV)/fuzz
	$(BIN)/uv pip install --quiet --python $(VENV)/fuzz --constraint constraints.txt --editable ".[all]" atheris
	for target in $(FUZZED); do CQRS_ES_STORE_URL=memory:// CQRS_ES_BROKER_URL=memory:// \
		$(VENV)/fuzz/bin/python -m tests.fuzz $$target -max_total_time=$(FUZZ_SECONDS) || exit 1; done

recipes: $(VENV)/.installed  ## run the gateway within FastAPI, Litestar and Django, as docs/http.md has it
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VENV)/recipes
	$(BIN)/uv pip install --quiet --python $(VENV)/recipes --constraint constraints.txt \
		--editable ".[dev]" django litestar
	$(VENV)/recipes/bin/pytest tests/integration/test_http_recipes.py -rs $(PYTEST_ARGS)

containers: $(VENV)/.installed  ## build the images, run the compose file with a Docker engine, and kill some of it
	deploy/containers/build-stand-ins
	CI=true CQRS_ES_TEST_CONTAINERS=1 $(BIN)/pytest tests/deployment/test_containers.py -s $(PYTEST_ARGS)

deploys: $(VENV)/.installed  ## rolling deploys on two pairs of servers; views, and restores, on every store
	CI=true CQRS_ES_TEST_DEPLOYS=1 $(BIN)/pytest tests/faults/test_deploys.py \
		tests/integration/test_view_versions.py tests/integration/test_restored_store.py \
		--log-cli-level=WARNING $(PYTEST_ARGS)

serverless: $(VENV)/.installed  ## functions at size: 10,000 commands under kills; the package as it is deployed
	CI=true CQRS_ES_TEST_SERVERLESS=$(FUNCTION_COMMANDS) $(BIN)/pytest tests/faults/test_serverless.py \
		--log-cli-level=WARNING $(PYTEST_ARGS)
	PIP=$(BIN)/pip deploy/aws/make-package
	du -sh build/functions

check: $(VENV)/.installed  ## style, types, layers; the files of the deployment
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/cfn-lint deploy/aws/template.yaml
	$(BIN)/pytest --quiet tests/deployment/test_schemas.py

format: $(VENV)/.installed  ## rewrite the source in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

schemas: $(VENV)/.installed  ## write schemas.json of the bank anew
	$(BIN)/cqrs-es schema export . --only schemas.json

upgrade:  ## move constraints.txt to the newest versions, then check and test everything
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@{ sed -n '/^#/p' constraints.txt; \
	$(BIN)/python -m pip freeze --exclude-editable --exclude pip --exclude setuptools; } >$(VENV)/new
	mv $(VENV)/new constraints.txt
	touch $(VENV)/.installed
	$(MAKE) check test test-lowest

audit: $(VENV)/.installed  ## look up known weaknesses of the pinned versions; fails where nobody could be asked
	$(BIN)/uv tool run pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

sbom: $(VENV)/.installed  ## write what an installation consists of to dist/sbom.json (CycloneDX)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VENV)/shipped
	$(BIN)/uv pip install --quiet --python $(VENV)/shipped --constraint constraints.txt ".[all]"
	mkdir -p dist
	$(BIN)/uv tool run --from cyclonedx-bom cyclonedx-py environment --pyproject pyproject.toml \
		--output-reproducible --output-file dist/sbom.json $(VENV)/shipped

secrets:  ## random passwords for docker-compose.yml, into secrets/; those that are there stay
	@deploy/make-secrets

clean:  ## remove the virtual environment and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist build

# The stamp is younger than these files exactly when what they ask for is installed.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
