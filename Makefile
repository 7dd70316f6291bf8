# What one does with this repository. `make` alone lists it.

PYTHON ?= python3
# Snakemake's jobs run this many at a time, and so do the tests.
CORES ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 8 ? cores : 8)))

BIN := .venv/bin
# Made when the environment is what the lock file named in it says.
STAMP := .venv/.metacanary-setup
LOCK ?= $(or $(file <$(STAMP)),requirements.txt)
PYPI := https://pypi.org/simple

SNAKEMAKE := $(BIN)/python -m snakemake
DEMO := config/digits.yaml
DEMO_RESULTS := results/digits
CONFIGS := $(wildcard config/*.yaml tests/tiny.yaml)

.DEFAULT_GOAL := help
.PHONY: help setup setup-cuda lock demo report publish cost bundle test test-all test-full test-slurm slurm-packages slurm-tables bench-metagradient bench-dpsgd bench-together bench-audits check check-python check-workflow format clean

help:  ## list the targets
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv with exactly the locked packages

setup-cuda:  ## the same with CUDA 13; the other targets keep it
	@grep -qsx requirements-cuda.txt $(STAMP) || rm -f $(STAMP)
	@$(MAKE) --no-print-directory setup LOCK=requirements-cuda.txt

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "metacanary needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." >&2; \
	  echo "Name another one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# pip installs only uv, from the hashes in the lock file; uv then takes seconds for what takes pip minutes, and asks
# the same index. The bytecode is compiled now, whatever PYTHONDONTWRITEBYTECODE says: the first import is slow.
# The second try trusts the machine's own certificates, which a network with a proxy may need.
# venv makes bin/python before pip is there, so that a kill may leave the one without the other.
$(STAMP): $(LOCK) | $(BIN)/python
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	awk '/^uv==/ {on = 1} on {print} on && !/\\$$/ {exit}' $(LOCK) > .venv/uv.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt
	index=$$($(BIN)/python -m pip config get global.index-url 2>/dev/null || echo $(PYPI)); \
	sync() { env -u PYTHONDONTWRITEBYTECODE UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$index}}" \
	  $(BIN)/uv pip sync --python $(BIN)/python --require-hashes --compile-bytecode "$$@" $(LOCK); }; \
	sync || sync --system-certs
	@echo $(LOCK) > $@

COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
  --custom-compile-command "make lock" --extra dev

lock: | $(BIN)/uv  ## write both lock files anew after a change of pyproject.toml
	$(COMPILE) pyproject.toml -o requirements.txt
	$(COMPILE) --extra cuda -c requirements.txt pyproject.toml -o requirements-cuda.txt

$(BIN)/uv:
	@$(MAKE) --no-print-directory setup

# A killed Snakemake leaves its lock behind. Another demo that still runs holds DEMO_LOCK; if none does, the lock is stale.
DEMO_LOCK := $(if $(shell command -v flock),flock --nonblock --close .snakemake/demo.lock)

demo: setup  ## the whole pipeline on handwritten digits, then its result table
	@mkdir -p .snakemake
	@$(DEMO_LOCK) sh -ec '$(SNAKEMAKE) --configfile $(DEMO) --quiet all --unlock; \
	  exec $(SNAKEMAKE) --cores $(CORES) --configfile $(DEMO)' || { \
	  echo "make demo stopped: see above, or it is running already. Call it again to go on." >&2; exit 1; }
	@$(BIN)/python -m metacanary.tables $(DEMO_RESULTS)

report: setup  ## the demo's page of all audits, and Snakemake's report with its graph, code and statistics
	$(SNAKEMAKE) --cores $(CORES) --configfile $(DEMO)
	$(SNAKEMAKE) --cores 1 --configfile $(DEMO) --report $(DEMO_RESULTS)/report.html

# Of a finished workflow; RESULTS=results/cifar10_small for another one than the demo.
RESULTS ?= $(DEMO_RESULTS)

publish: setup  ## copy RESULTS, the demo's, to docs/results; renew tables and numbers of README and docs
	$(BIN)/python -m metacanary.publish $(RESULTS)

# Of the config CONFIG; COST_OPTIONS=--rows=64 where a whole step takes too long.
CONFIG ?= config/config.yaml
COST_OPTIONS ?=

cost: setup  ## jobs, hours and disk of CONFIG, before anything is submitted
	PYTHONPATH=. $(BIN)/python workflow/scripts/_cost.py $(CONFIG) $(COST_OPTIONS)

# make bundle CONFIG=config/cifar10_small.yaml for another one than the demo.
bundle: CONFIG = $(DEMO)
bundle: setup  ## the results of CONFIG, the demo's, as open data in the folder bundle of its results
	$(SNAKEMAKE) --cores $(CORES) --configfile $(CONFIG) -- bundle

test: setup  ## the tests that need neither a GPU nor many minutes
	$(BIN)/python -m pytest -n $(CORES)

test-all: setup  ## all tests that this machine can run
	$(BIN)/python -m pytest -n $(CORES) -m "not full"

# FULL=wrn16_4_eps8 for those whose name has it in it; MICROBATCH=8 and COPIES=1 for what a CPU has memory and time for.
test-full: setup  ## two updates of each large private training as configured: minutes on a GPU, hours on a CPU
	XLA_FLAGS=--xla_gpu_deterministic_ops=true $(BIN)/python -m pytest -s -m full -k "$(FULL)" \
		$(if $(MICROBATCH),--microbatch $(MICROBATCH)) $(if $(COPIES),--copies $(COPIES)) tests/test_full_size.py

# Everything that goes wrong on a cluster, on a real one on this machine; SLURM_TESTS="slurm and not slow" takes less long.
SLURM_TESTS ?= slurm

test-slurm: setup  ## the tests on a SLURM cluster that they start on loopback
	$(BIN)/python -m pytest -m "$(SLURM_TESTS)" tests/slurm --tables build/slurm

slurm-packages:  ## install SLURM for these tests, as root, on Debian or Ubuntu; no daemon is started
	tests/slurm/install.sh

slurm-tables: setup  ## publish what `make test-slurm` measured in docs/slurm.md
	mkdir -p docs/results/slurm
	cp build/slurm/*.csv docs/results/slurm
	$(BIN)/python tests/slurm/tables.py

# An environment of its own: the peers bring PyTorch and half of Hugging Face.
BENCH := .venv-bench/bin
BENCH_STAMP := .venv-bench/.metacanary-setup
TORCH_INDEX := https://download.pytorch.org/whl/cpu

bench-metagradient: $(BENCH_STAMP)  ## seconds and memory of metagradients beside their peers, half an hour
	$(BENCH)/python -m benchmarks.metagradient
	$(BENCH)/python -m benchmarks.step_vjp
	$(BENCH)/python -m benchmarks.paper_cost
	$(BENCH)/python -m benchmarks.plot_metagradient
	$(BENCH)/python -m benchmarks.tables

bench-dpsgd: $(BENCH_STAMP)  ## examples per second and memory of a DP-SGD step beside its peers
	$(BENCH)/python -m benchmarks.dpsgd
	$(BENCH)/python -m benchmarks.ghost_norms
	$(BENCH)/python -m benchmarks.tables

bench-together: $(BENCH_STAMP)  ## audit runs at once beside one after the other; BENCH_OPTIONS="--device gpu" on a GPU
	$(BENCH)/python -m benchmarks.runs_together $(BENCH_OPTIONS)
	$(BENCH)/python -m benchmarks.tables

bench-audits: $(BENCH_STAMP)  ## level, power and seconds of bounds on epsilon beside their peers, an hour
	$(BENCH)/python -m benchmarks.audit_speed
	$(BENCH)/python -m benchmarks.calibration
	$(BENCH)/python -m benchmarks.audit_peers
	$(BENCH)/python -m benchmarks.dirac_bounds
	$(BENCH)/python -m benchmarks.tables

# PyTorch's index is asked only if pip does not know the version without CUDA.
$(BENCH_STAMP): requirements.txt benchmarks/requirements.txt
	$(PYTHON) -m venv --clear .venv-bench
	install() { $(BENCH)/python -m pip install --quiet --disable-pip-version-check --compile "$$@"; }; \
	install --require-hashes -r requirements.txt && { \
	install --no-deps -r benchmarks/requirements.txt || \
	install --no-deps --extra-index-url $(TORCH_INDEX) -r benchmarks/requirements.txt; }
	@touch $@

check: check-python check-workflow  ## format, lint, types, workflow, config files, lock files

check-python: setup  ## what of it concerns the package and its tests
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -q tests/test_project.py tests/test_documents.py

check-workflow: setup  ## what of it concerns the workflow
	$(BIN)/python -m snakefmt --check Snakefile workflow
	set -e; for config in $(CONFIGS); do $(SNAKEMAKE) --lint --configfile $$config; done
	$(BIN)/python -m pytest -q tests/test_config.py

format: setup  ## format the Python and Snakemake files
	$(BIN)/ruff format
	$(BIN)/ruff check --fix
	$(BIN)/python -m snakefmt Snakefile workflow

clean:  ## delete the demo's results and all caches, not .venv, the data or other results
	rm -rf $(DEMO_RESULTS) .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
