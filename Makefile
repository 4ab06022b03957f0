# One virtual environment in .venv, made on first need; `make help` lists what there is.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup demo console test unit simulate chaos bench lint format kafka clean

help: ## list these targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The strict editable install lets mypy and editors see the package whose root is the repository's root
# (docs/decisions/0001). It links file by file, so it runs again whenever a package gains or loses a file.
SOURCES := $(shell find state handlers streams \( -name '*.py' -o -path '*/console/static/*' -o -path '*/console/templates/*' \) -type f 2>/dev/null | sort)
LISTING := $(VENV)/.listing

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "rowmill needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"

.PHONY: listing
listing: $(BIN)/python
	@echo '$(SOURCES)' | cmp -s - $(LISTING) || { echo '$(SOURCES)' > $(LISTING); rm -f $(VENV)/.installed; }

$(VENV)/.installed: pyproject.toml __init__.py | listing
	@echo "installing rowmill and its development tools into $(VENV) …"
	@rm -rf build rowmill.egg-info
	@$(BIN)/pip install --quiet --disable-pip-version-check --group dev -e '.[examples]' \
	    --config-settings editable_mode=strict > $(VENV)/install.log 2>&1 || { cat $(VENV)/install.log; exit 1; }
	@touch $@

setup: listing ## make .venv and install everything into it
	@$(MAKE) --no-print-directory $(VENV)/.installed

demo: setup ## run the example on the embedded broker: progress, summary, correlation
	@mkdir -p .rowmill
	@env -u ROWMILL_BROKER $(BIN)/rowmill run examples/reviews.py \
	    --input examples/data/reviews.csv --output .rowmill/scored.csv
	@echo
	@$(BIN)/python examples/reviews.py .rowmill/scored.csv
	@echo
	@echo "the commands are in $(BIN): \`. $(BIN)/activate\` puts them on the PATH"

console: setup ## the web page of all sessions on the embedded broker: make console ARGS="--port 8080"
	@exec $(BIN)/rowmill console $(ARGS)

# Each worker has a Kafka of its own and takes whole files, in order: the long ones of chaos and integration first.
JOBS ?= 0

test: setup ## every test (JOBS=2: two at a time); on Apache Kafka where Java and Maven (or Docker) are, in Chromium where it is
	$(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder

unit: setup ## the quick tests only
	$(PYTEST) tests/unit tests/property -x -q

chaos: setup ## break workers and Kafka on purpose, judge, and write docs/reliability.md (takes about 40 minutes)
	$(BIN)/python -m tests.chaos

bench: setup ## rowmill beside its peers, same work, same broker (1.5 to 2 hours): make bench ARGS="P1 --runs 7"
	$(BIN)/python -m benchmarks $(ARGS)

SEEDS ?= 300

simulate: setup ## the real worker on a virtual clock, two processes: make simulate SEEDS=2000
	$(BIN)/python -m tests.simulation --seeds $(SEEDS) --jobs 2

lint: setup ## ruff, mypy, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p rowmill
	MYPYPATH=tests $(BIN)/mypy --explicit-package-bases tests benchmarks
	$(BIN)/lint-imports

format: setup ## let ruff mend and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

kafka: setup ## Apache Kafka on port 9092, or the next free one, until Ctrl-C
	@exec $(BIN)/python tests/support/kafka_server.py

clean: ## remove the environment and everything that tools leave behind
	rm -rf $(VENV) build *.egg-info .rowmill .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
