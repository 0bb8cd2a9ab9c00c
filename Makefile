# make demo: from a fresh clone to a result.  make test, make lint, make docs: what .ci/run runs.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test lint docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.test
	$(VENV)/bin/python recipes/fetch_texts.py texts
	$(VENV)/bin/parflow run recipes/wordcount.py --source 'texts/**/*.txt' --workers 2
	@echo
	@echo "To look further:"
	@echo "  . $(VENV)/bin/activate"
	@echo "  parflow runs                  the runs so far"
	@echo "  parflow show RUN              one of them: stages, times, failures"
	@echo "  parflow failures RUN          records that were set aside, and why"
	@echo "  less recipes/wordcount.py     the program: a task and a workflow"

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.test $(VENV)/.lint
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "docs: build/site/index.html"

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis

# One stamp for each extra: pip runs again only when pyproject.toml changed.
$(VENV)/.test $(VENV)/.lint $(VENV)/.docs: $(VENV)/.%: pyproject.toml | $(VENV)/bin/pip
	@echo "installing parflow[$*] into $(VENV)"
	@$(PIP) --editable '.[$*]'
	@touch $@

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "parflow needs Python 3.11 or newer, $(PYTHON) is: $$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) can't make virtual environments; on Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
