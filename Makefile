# Each target does its own set-up; a second run installs nothing.
VENV ?= .venv
export VPMOE_VENV := $(VENV)
PYTHON := $(VENV)/bin/python

# Nothing runs over the network and nothing reports home.
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
export RAY_USAGE_STATS_ENABLED := 0
# Waiting threads sleep: with fewer free cores than threads, spinning made scoring 2.7 times slower (measured).
export OMP_WAIT_POLICY := passive

.PHONY: setup demo demo-opd test check bench

setup:
	@bash scripts/setup.sh

demo: setup
	@$(PYTHON) -m demo.run

demo-opd: setup
	@$(PYTHON) -m demo.opd

# Two at a time, whole files: most of the time goes into processes that start or wait for each other.
test: setup
	@$(PYTHON) -m pytest -n 2 --dist loadfile

check: setup
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

# score, kd_vs_ce and opd_curve measure on what `make demo` leaves; target_fidelity reads the real rows in VPMOE_SYNTH.
bench: setup
	$(PYTHON) -m pip install --disable-pip-version-check -qq --no-deps -r requirements/bench.lock
	$(PYTHON) -m benchmarks.build
	$(PYTHON) -m benchmarks.codec
	$(PYTHON) -m benchmarks.rollouts
	$(PYTHON) -m benchmarks.loss --device cpu
	$(PYTHON) -m benchmarks.score --model teachers/tiny
	$(PYTHON) -m benchmarks.kd_vs_ce
	$(PYTHON) -m benchmarks.opd_curve
	$(PYTHON) -m benchmarks.target_fidelity
	$(PYTHON) -m benchmarks.limits
	$(PYTHON) -m benchmarks.target_variants
