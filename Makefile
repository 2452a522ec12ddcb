# The two commands, `make demo` and `make test`, and what a developer needs. GNU make 3.81 (macOS) is enough.
#
# Everything is installed into .venv, at the versions of constraints.txt; delete .venv to start over. A second run installs
# nothing and needs no network; the C extension is rebuilt when csrc/ changes. `make PYTHON=python3.12 demo` picks a Python.

SHELL := /bin/bash
.SHELLFLAGS := -e -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?=
PYTEST_ARGS ?=
PY := .venv/bin/python
# The tests share the machine with torch's own threads: more workers than this only wait for each other.
WORKERS := -n auto --maxprocesses 4

# A pip setting that installs somewhere other than .venv would undo what follows; indexes, proxies and certificates stay yours.
export PIP_USER := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PIP_TARGET PIP_PREFIX PIP_ROOT PIP_NO_DEPS PYTHONHOME PYTHONPATH
PIP := $(PY) -m pip install --no-build-isolation --constraint constraints.txt

.NOTPARALLEL:
.PHONY: help demo test lint sanitize levels wheels symbols clean

help:
	@echo "make demo      load the bundled 2-bit model, measure it, and let it write"
	@echo "make test      run the tests                 (PYTEST_ARGS='-k moe' for some of them)"
	@echo "make lint      ruff and mypy"
	@echo "make sanitize  run the tests of the ops under ASan and UBSan (Linux, gcc)"
	@echo "make levels    check the CPU kernels as plain C programs: here, and for arm64 under qemu-user if that is installed"
	@echo "make wheels    build and check the wheels of every platform, into dist/ (Linux)"
	@echo "make symbols   check csrc/torch_shim.h against PyTorch's macOS wheels (Linux; downloads 330 MB once)"
	@echo "make clean     remove .venv and everything that was built"

demo: .venv/.built .venv/.deps-hf
	@$(PY) -m metal_marlin demo

test: .venv/.built .venv/.deps-test
	$(PY) -m pytest $(WORKERS) $(PYTEST_ARGS)

lint: .venv/.built .venv/.deps-dev
	$(PY) -m ruff check .
	$(PY) -m mypy

# The extra brings zig, a C compiler for every platform (100 MB).
levels: .venv/.built .venv/.deps-wheels
	$(PY) -m pytest -rA $(PYTEST_ARGS) tests/test_levels.py

wheels: .venv/.built .venv/.deps-wheels
	$(PY) .ci/wheels.py $(WHEELS)

symbols: .venv/.built .venv/.deps-wheels
	$(PY) .ci/symbols.py

clean:
	rm -rf .venv build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache metal_marlin/*.so

# ---- .venv: the interpreter, then the extension (a missing compiler shows in seconds), then the large downloads ----

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 10))
.venv/.python:
	@if [ -e .venv ]; then \
	  $(PY) -c '$(NEW_ENOUGH)' 2>/dev/null && exit 0; \
	  echo "the Python in .venv does not run or is older than 3.10: remove .venv ('make clean' does) and try again" >&2; exit 1; \
	fi; \
	for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.14 python3.13 python3.12 python3.11 python3.10); do \
	  command -v "$$python" >/dev/null 2>&1 && "$$python" -c '$(NEW_ENOUGH)' 2>/dev/null || continue; \
	  "$$python" -m venv .venv && exit 0; \
	  rm -rf .venv; \
	  echo "$$python could not make .venv; on Debian and Ubuntu, install its venv package (python3-venv)" >&2; exit 1; \
	done; \
	python="$(or $(PYTHON),python3)"; \
	echo "metal_marlin needs Python 3.10 or newer; $$python is" \
	     "$$("$$python" --version 2>/dev/null || echo "not a Python that runs here")" >&2; \
	echo "install one, or name it: make PYTHON=/path/to/python3.12 $(or $(firstword $(MAKECMDGOALS)),demo)" >&2; exit 1
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip --upgrade
	@touch $@

.venv/.setuptools: .venv/.python constraints.txt
	@$(PY) -m pip install --quiet --constraint constraints.txt setuptools packaging
	@touch $@

CSRC := $(shell find csrc -name '*.[ch]' -o -type d)
.venv/.built: .venv/.setuptools setup.py pyproject.toml metal_marlin/_version.py $(CSRC)
	@echo "building the C extension"
	@cc="$${CC:-$$($(PY) -c 'import sysconfig; print(sysconfig.get_config_var("CC") or "cc")')}"; \
	if ! $$cc --version >/dev/null 2>&1; then cc=cc; fi; \
	if ! $$cc --version >/dev/null 2>&1; then \
	  echo "metal_marlin needs a C compiler: install gcc or clang (macOS: xcode-select --install), or set CC" >&2; exit 1; \
	fi; \
	rm -f metal_marlin/_C.*.so; \
	CC="$$cc" $(PIP) --quiet --no-deps --editable .
	@touch $@

.venv/.deps-%: pyproject.toml constraints.txt | .venv/.built
	@if [ ! -e $@ ]; then echo "installing what '$*' needs into .venv (the first time, PyTorch is a large download)"; fi
	@$(PIP) $(if $(VERBOSE),,--quiet) "metal_marlin[$*]"  # the package itself is here already: this adds what it needs
	@touch $@

# ---- the ops under the sanitizers: a second build of the package, used from its own folder ----

SANITIZED := build/sanitize/lib
SANITIZE := address,undefined
SANITIZE_CFLAGS := -fsanitize=$(SANITIZE) -fno-sanitize-recover=all -fno-omit-frame-pointer -fno-wrapv -UNDEBUG -g -O1
# The ops' own tests; those that compile or load models take long and run little more of our C.
SANITIZE_TESTS ?= $(wildcard $(addprefix tests/test_, $(addsuffix .py, \
                   decode dequantize linear moe activations router gradients memory threads bad_input metal_queue)))
# On the emulator, the ops with the most encoder code; its own runtime and the shaders are not sanitized.
SANITIZE_ONLY ?= not emulated or test_moe or test_linear or test_router or test_metal_queue
# libstdc++ goes first in line after the runtimes: ASan looks for __cxa_throw when it starts, torch throws through our frames.
SANITIZE_ENV = LD_PRELOAD="$$($(SANITIZE_CC) -print-file-name=libasan.so) $$($(SANITIZE_CC) -print-file-name=libubsan.so) \
               $$($(SANITIZE_CC) -print-file-name=libstdc++.so.6)" \
               ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1
SANITIZE_CC ?= gcc

sanitize: .venv/.built .venv/.deps-test
	rm -rf build/sanitize
	CC=$(SANITIZE_CC) METAL_MARLIN_CFLAGS="$(SANITIZE_CFLAGS)" METAL_MARLIN_LDFLAGS="-fsanitize=$(SANITIZE)" \
	  $(PY) setup.py --quiet build --build-temp build/sanitize/tmp --build-lib $(SANITIZED)
	cd $(SANITIZED) && $(SANITIZE_ENV) ../../../$(PY) -c 'import metal_marlin; assert "sanitize" in metal_marlin.__file__'
	cd $(SANITIZED) && $(SANITIZE_ENV) ../../../$(PY) -m pytest $(WORKERS) -k "$(SANITIZE_ONLY)" $(PYTEST_ARGS) $(addprefix ../../../,$(SANITIZE_TESTS))
