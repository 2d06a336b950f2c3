# install, demo, test, test-fast, test-launchers, test-parity, lint, docs: each builds .venv if it is missing.
PYTHON ?= python3.11
BIN := .venv/bin
DEMO := runs/demo
.DELETE_ON_ERROR:

.PHONY: install
install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

.venv/dev: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,dev]'
	touch $@

.venv/docs: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

.venv/parity: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,parity]'
	touch $@

# The demo: from nothing to 1024 px images by the commands that a user would give. Each goes on where it stopped.
.PHONY: demo
demo: .venv/installed
	$(BIN)/python -m tools.shapes $(DEMO)/shards --num 1024 --size 1024 --seed 0
	test -e $(DEMO)/t5 || $(BIN)/python -m tools.tiny_t5 $(DEMO)/t5 --captions $(DEMO)/shards/*.tar
	$(BIN)/cascade cache-text configs/tiny/base64.yaml
	$(BIN)/cascade train configs/tiny/base64.yaml
	$(BIN)/cascade train configs/tiny/sr256.yaml
	$(BIN)/cascade train configs/tiny/sr1024.yaml
	$(BIN)/cascade export configs/tiny/cascade.yaml
	$(BIN)/cascade sample $(DEMO)/cascade --prompts configs/tiny/prompts.txt --out $(DEMO)/images --seed 0
	$(BIN)/python -m tools.overview $(DEMO)/images $(DEMO)/overview.png
	$(BIN)/cascade sample $(DEMO)/cascade --prompts configs/tiny/captions.txt --out $(DEMO)/agreement --seed 0 --to base
	$(BIN)/python -m tools.agreement $(DEMO)/agreement

# Tests run in two processes; what they share by compiling it stays in one (tests/conftest.py).
.PHONY: test
test: .venv/installed
	$(BIN)/pytest -n 2

.PHONY: test-fast
test-fast: .venv/installed
	$(BIN)/pytest -n 2 -m 'not slow and not parity and not launchers'

.PHONY: test-launchers
test-launchers: .venv/installed
	$(BIN)/pytest -m launchers

.PHONY: test-parity
test-parity: .venv/parity
	$(BIN)/pytest -m parity

.PHONY: lint
lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site, from docs/ and the docstrings, into site/. A broken link, or anything that a page
# would fetch from another host, is an error (docs/hooks.py).
.PHONY: docs
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
