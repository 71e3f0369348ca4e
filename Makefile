# make demo: set up and see all of it work. make install: set up. make test: what a contributor runs.
# make check: format, lint, types. make readme: the measured table into README.md, from its records.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

SOURCES := pyproject.toml setup.py $(wildcard models/distance/csrc/*)  # after changes in these, an install is due

.PHONY: demo install test test-all check format readme clean

demo: $(VENV)/.installed
	$(BIN)/linflab sweep digits_eps0.1_linf_dist_net demo --budget 8
	@echo "This shell knows linflab after: source $(BIN)/activate"

install: $(VENV)/.installed

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow and not browser and not cluster"

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p build/types && ln -sfn ../.. build/types/linflab
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../mypy \
		-p linflab.models -p linflab.search_spaces -p linflab.reports -p linflab.platform

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

readme: $(VENV)/.installed
	grep -q "^<!-- measured -->" README.md && grep -q "^<!-- end -->" README.md
	$(BIN)/linflab report measured --out build/readme
	sed -e '/^<!-- measured -->/,/^<!-- end -->/{//!d;}' -e '/^<!-- measured -->/r build/readme/measured.md' README.md \
		> build/readme/README.md
	cp build/readme/README.md README.md

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "linflab needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# a stamp is as old as what was installed: sources may change meanwhile
$(VENV)/.installed: $(VENV)/.created $(SOURCES)
	touch $@.new
	$(BIN)/python -m pip install --quiet --editable .
	mv $@.new $@

$(VENV)/.installed-dev: $(VENV)/.created $(SOURCES)
	touch $@.new
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	cp -p $@.new $(VENV)/.installed
	mv $@.new $@
