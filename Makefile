# Targets install what they need in .venv, once. Paths are relative, so that the checkout can be in a
# folder with a space in its name.
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --constraint constraints.txt
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt

# Two workers with one thread each. Tests that need more threads set the number of threads.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist worksteal

.PHONY: demo test pythons versions soak mutate mutate-report mutate-sample sanitize bench compare-commits lint format docs wheel hooks clean
.DEFAULT_GOAL := demo

demo: .venv/.installed ## train a teacher and a student on handwritten digits
	$(PY) -m bdkd train digits

test: .venv/.installed-dev ## run all tests
	$(PYTEST)

PYTHONS ?=
pythons: ## run make demo and make test with each installed Python, or with PYTHONS="python3.12 ..."
	$(PYTHON) tests/pythons.py $(PYTHONS)

VERSIONS ?=
versions: .venv/.installed-dev ## run the kernel tests with each torch and its triton, or with VERSIONS="--only 2.13 ..."
	$(PY) tests/versions.py $(VERSIONS)

soak: .venv/.installed-dev ## run the long versions of the tests
	$(PYTEST) -m soak

mutate: .venv/.installed-dev ## make small wrong changes to the code and check that a test fails; in the background
	$(PY) tests/mutation $(MUTATE)

mutate-report: .venv/.installed-dev ## write the results of make mutate to tests/mutation/report.md
	$(PY) tests/mutation --report

mutate-sample: .venv/.installed-dev ## run fifty mutants, each with the test that must catch it
	$(PY) tests/mutation --sample

sanitize: .venv/.installed-dev ## run the native kernel under address and undefined-behaviour sanitizers
	$(PY) kernels/csrc/sanitize.py

bench: .venv/.installed-dev ## run all benchmark suites that this machine can run
	$(PY) bench

compare-commits: .venv/.installed-dev ## train every recipe in the worktree OLD and here, and compare every step
	OMP_NUM_THREADS=1 $(PY) bench/compare_commits.py $(OLD)

lint: .venv/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: .venv/.installed-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: .venv/.installed-docs ## build the documentation in docs/_build; offline, warnings are errors
	$(PY) -m sphinx -W --keep-going -q docs docs/_build
	@echo "docs/_build/index.html"

wheel: .venv/.installed-dev ## build the source distribution and the wheel for this machine in dist/
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -m build --no-isolation

hooks: .venv/.installed-dev ## run linter and type checker before every git commit
	$(PY) -m pre_commit install

clean: ## remove everything that make built, except runs
	rm -rf .venv build dist docs/_build *.egg-info kernels/bdkd_kernels/*.so

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "bdkd needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv \
		|| { rm -rf .venv; echo "cannot create .venv; on Debian: apt install python3-venv" >&2; exit 1; }

.venv/.installed: .venv/bin/python $(SOURCES)
	$(PIP) --editable '.[train]'
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --editable '.[dev]'
	@touch $@

.venv/.installed-docs: .venv/.installed
	$(PIP) --editable '.[docs]'
	@touch $@
