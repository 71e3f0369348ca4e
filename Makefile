# make demo: install and run a small sweep. make install: install. make unit: fast tests. make test: tests to run before
# a contribution. make check: format, lint and types. make readme: update measured results in README.md and docs/.
# make docs: build the documentation into build/site.
# make dist: build dist/, with a wheel and a source distribution. make lowest: the lowest allowed versions exist.
# make gpu: test, time, profile and train on a CUDA device in under 9 minutes (ARGS: see benchmarks/gpu.py).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Phrases that readers have to decode, found in no text of this repository.
PHRASES := "will do|comes to|come to|so many|one's own|anew|for want of|says nothing|goes on with|go on with|rightly|what there is"

SOURCES := pyproject.toml setup.py $(wildcard models/distance/csrc/*)  # changes in these require a new installation

.PHONY: demo install unit test test-all check format readme docs gpu dist lowest clean

demo: $(VENV)/.installed
	$(BIN)/linflab sweep digits_eps0.1_linf_dist_net demo --budget 8
	@echo "To use linflab in this shell, run: source $(BIN)/activate"

install: $(VENV)/.installed

unit: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n logical --maxprocesses 4 \
		-m "not integration and not slow and not browser and not cluster and not slurm"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile -m "not slow and not browser and not cluster and not slurm"

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@! git grep -nwiE $(PHRASES) -- . ':!*.jsonl' ':!Makefile' || { echo "reword the lines above"; exit 1; }
	mkdir -p build/types && ln -sfn ../.. build/types/linflab
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../mypy \
		-p linflab.models -p linflab.search_spaces -p linflab.reports -p linflab.platform

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

gpu: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/gpu.py $(ARGS)

# The wheel is built from the source distribution, and repaired to run on other Linux systems.
dist: $(VENV)/.installed-dev
	rm -rf build/dist dist
	LINFLAB_REQUIRE_KERNELS=1 $(BIN)/python -m build --outdir build/dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist/

lowest: $(VENV)/.installed-dev
	$(BIN)/uv pip compile --native-tls --quiet --resolution lowest-direct --all-extras --python-version 3.11 \
		--output-file build/lowest.txt pyproject.toml

readme: $(VENV)/.installed-docs
	$(BIN)/python docs/generate/readme.py

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python docs/generate/check_site.py build/site

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "PYTHON=$(PYTHON): must be Python 3.11 or newer; use make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# The stamp gets the time at which the installation started, since sources may change during it.
$(VENV)/.installed: $(VENV)/.created $(SOURCES)
	touch $@.new
	$(BIN)/python -m pip install --quiet --editable '.[cluster]'
	mv $@.new $@

$(VENV)/.installed-dev: $(VENV)/.created $(SOURCES)
	touch $@.new
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	cp -p $@.new $(VENV)/.installed
	cp -p $@.new $(VENV)/.installed-docs
	mv $@.new $@

# Only what the extra adds, since another installation of linflab compiles its kernels again.
$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
		print(*(one for one in extras["docs"] if not one.startswith("linflab")), sep="\n")' > $@.new
	$(BIN)/python -m pip install --quiet --requirement $@.new
	mv $@.new $@
