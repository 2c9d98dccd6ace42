# Everything here sets itself up in .venv and does nothing twice. Paths are relative, so that a
# checkout may lie in a folder with a space in its name.
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --constraint constraints.txt
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt

# Two workers of one thread each: tests that want more threads ask for them.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist worksteal

.PHONY: demo test pythons versions soak mutate mutate-report mutate-sample sanitize bench compare-commits lint format docs wheel hooks clean
.DEFAULT_GOAL := demo

demo: .venv/.installed ## train a teacher and a student on handwritten digits
	$(PY) -m bdkd train digits

test: .venv/.installed-dev ## the whole suite
	$(PYTEST)

PYTHONS ?=
pythons: ## make demo and make test with each installed Python, or PYTHONS="python3.12 ..."
	$(PYTHON) tests/pythons.py $(PYTHONS)

VERSIONS ?=
versions: .venv/.installed-dev ## the kernel tests with each torch and its triton, or VERSIONS="--only 2.13 ..."
	$(PY) tests/versions.py $(VERSIONS)

soak: .venv/.installed-dev ## the tests again, many times longer
	$(PYTEST) -m soak

mutate: .venv/.installed-dev ## change the code carelessly and see whether a test fails; in the background
	$(PY) tests/mutation $(MUTATE)

mutate-report: .venv/.installed-dev ## what the mutants of make mutate have shown, into tests/mutation/report.md
	$(PY) tests/mutation --report

mutate-sample: .venv/.installed-dev ## fifty mutants and the test that must catch each
	$(PY) tests/mutation --sample

sanitize: .venv/.installed-dev ## the native kernel under address and undefined-behaviour sanitizers
	$(PY) kernels/csrc/sanitize.py

bench: .venv/.installed-dev ## measure what this machine can run
	$(PY) bench

compare-commits: .venv/.installed-dev ## train every recipe in the worktree OLD and here, compare steps
	OMP_NUM_THREADS=1 $(PY) bench/compare_commits.py $(OLD)

lint: .venv/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: .venv/.installed-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: .venv/.installed-docs ## the documentation, into docs/_build; offline, warnings are errors
	$(PY) -m sphinx -W --keep-going -q docs docs/_build
	@echo "docs/_build/index.html"

wheel: .venv/.installed-dev ## source distribution and this machine's wheel, into dist/
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -m build --no-isolation

hooks: .venv/.installed-dev ## lint and types before every git commit
	$(PY) -m pre_commit install

clean: ## everything that was made here, runs excepted
	rm -rf .venv build dist docs/_build *.egg-info kernels/bdkd_kernels/*.so

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "bdkd needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv \
		|| { rm -rf .venv; echo "could not make .venv; on Debian: apt install python3-venv" >&2; exit 1; }

.venv/.installed: .venv/bin/python $(SOURCES)
	$(PIP) --editable '.[train]'
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --editable '.[dev]'
	@touch $@

.venv/.installed-docs: .venv/.installed
	$(PIP) --editable '.[docs]'
	@touch $@
