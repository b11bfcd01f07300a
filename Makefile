# Two commands for a fresh clone: `make demo` and `make test`. `make help` lists the rest.

BASE_PYTHON ?= python3
VENV        ?= .venv
PYTHON      ?=
TORCH_INDEX ?=
PIP_ARGS    ?=
OUT         ?= demo_out
DEMO_ARGS   ?=
TEST_ARGS   ?=
BENCH_ARGS  ?=
GPU_OUT     ?= benchmarks/results
GPU_ARGS    ?=
GPU_PYTHON  ?= 3.12

# The modules that each command imports, with the name under which pip knows them. PYTHON= installs what is missing of
# these and nothing else; the virtual environment gets the same from the extras in pyproject.toml. @name is a package
# without a module.
DEMO_NEEDS  = numpy sklearn:scikit-learn matplotlib
BENCH_NEEDS = numpy matplotlib pytest pytest_benchmark:pytest-benchmark
BUILD_NEEDS = setuptools wheel ninja
TRAIN_NEEDS = h5py jsonargparse:jsonargparse[signatures] kornia lightning matplotlib PIL:pillow torchmetrics
TEST_NEEDS  = $(DEMO_NEEDS) $(BENCH_NEEDS) $(BUILD_NEEDS) $(TRAIN_NEEDS) onnx onnxruntime onnxscript tensorboard hypothesis xdist:pytest-xdist requests transformers ruff \
              cmake pybind11 @nvidia-cuda-cuobjdump @nvidia-cuda-nvdisasm

ifeq ($(strip $(PYTHON)),)
  PY    = $(VENV)/bin/python
  READY = $(VENV)/.ready-$(1)
else
  PY    = $(PYTHON)
  READY = use-$(1)
endif

PIP = $(PY) -m pip --disable-pip-version-check --no-input

.PHONY: help demo test bench build gpu gpu-wheels lint clean use-demo use-test use-bench use-build
.DEFAULT_GOAL := help

help:
	@echo "make demo    train three small nets on marked digits, measure, draw two figures (two to five minutes)"
	@echo "make test    run the whole test suite, doctests included"
	@echo "make bench   run all benchmarks"
	@echo "make build   build the CUDA kernels in place where there is a CUDA toolkit; test and bench do it themselves"
	@echo "make gpu     on a machine with a GPU: its tests, compute-sanitizer, all benchmarks (under eight minutes, no network)"
	@echo "make gpu-wheels  what that needs beside torch, for a machine without network; goes to build/gpu_wheels"
	@echo "make lint    check the code with ruff"
	@echo "make clean   remove what these commands made"
	@echo
	@echo "Each makes a virtual environment in $(VENV) the first time. Instead of that:"
	@echo "  PYTHON=path/to/python     use this environment, which has torch already; torch stays as it is"
	@echo "Choices, after any command:"
	@echo "  BASE_PYTHON=python3.12    the interpreter to make the virtual environment from"
	@echo "  TORCH_INDEX=URL           where pip takes torch from, as PyTorch's install page gives it for your machine;"
	@echo "                            its CPU index spares you a large download where there is no GPU"
	@echo "  PIP_ARGS='...'            more options for every pip install"
	@echo "  OUT=DIR                   where the demo writes; demo_out unless told"
	@echo "  DEMO_ARGS='--quick'       options of the demo; --help lists them"
	@echo "  FISNET_CUDA_BUILD=1       fail where the kernels cannot be built; 0 leaves them out"
	@echo "  TEST_ARGS='-k loss'       options of pytest"
	@echo "  BENCH_ARGS='...'          options of the benchmarks"
	@echo "  GPU_OUT=DIR               where 'make gpu' writes; benchmarks/results unless told"
	@echo "  GPU_ARGS='--resume'       options of 'make gpu': --resume (leave out what is done), --minutes 9, --seconds tests=60,"
	@echo "                            --only kernels, --profile, --dry-run (no GPU needed); --help lists them"
	@echo "  GPU_PYTHON=3.12           the Python that 'make gpu-wheels' fetches packages for"

demo: $(call READY,demo)
	@$(PY) -m fisnet_cuda.demo --out "$(OUT)" $(DEMO_ARGS)

# One worker a core, one thread a worker: small tensors gain nothing from threads.
test: $(call READY,test) build
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto $(TEST_ARGS)

bench: $(call READY,bench) build
	@$(PY) -m benchmarks.run_all $(BENCH_ARGS)

# In place, so that an edit compiles only what it touches. Without a toolkit this says so, and the reference runs.
build: $(call READY,build)
	@echo "Building the CUDA kernels: what has changed of them, all of them the first time (minutes)"
	@mkdir -p build
	@$(PY) setup.py --quiet build_ext --inplace >build/log.txt 2>&1 || { cat build/log.txt; exit 1; }
	@grep '^fisnet_cuda:' build/log.txt || true

# With PYTHON= nothing is fetched: what is missing there comes from build/gpu_wheels.
gpu: $(if $(strip $(PYTHON)),,$(VENV)/.ready-test)
	@$(PY) -m benchmarks.gpu --out "$(GPU_OUT)" $(GPU_ARGS)

gpu-wheels: $(if $(strip $(PYTHON)),,$(VENV)/.ready-test)
	@$(PY) -m benchmarks.gpu_wheels --python "$(GPU_PYTHON)"

lint: $(call READY,test)
	@$(PY) -m ruff check .

clean:
	rm -rf .venv build dist demo_out .pytest_cache .ruff_cache .hypothesis .benchmarks *.egg-info
	rm -f fisnet_cuda/_C*.so fisnet_cuda/_build_note.txt
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# ---- An environment of our own -------------------------------------------------------------------------------------

$(VENV)/bin/python:
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "fisnet_cuda needs Python 3.10 or newer; '$(BASE_PYTHON)' is $$($(BASE_PYTHON) --version 2>&1 | head -n 1)."; \
	  echo "Name a newer one: make $(MAKECMDGOALS) BASE_PYTHON=python3.12"; exit 1; } >&2
	@$(BASE_PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(BASE_PYTHON)' comes without the venv module. On Debian and Ubuntu: apt install python3-venv."; \
	  echo "Or use an environment that has torch already: make $(MAKECMDGOALS) PYTHON=path/to/python"; exit 1; } >&2
	@echo "Making a virtual environment in $(VENV)"
	@$(BASE_PYTHON) -m venv "$(VENV)" || { rm -rf "$(VENV)"; exit 1; }

# torch first and by itself: its index, when one is named, need not have anything else.
$(VENV)/.ready-torch: constraints.txt | $(VENV)/bin/python
	@echo "Installing PyTorch (the largest part; once only)"
	@$(PIP) install -c constraints.txt $(PIP_ARGS) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") torch
	@touch $@

# What builds the kernels, and the package itself as a link to this folder: `make build` adds the kernels.
$(VENV)/.ready-build: $(VENV)/.ready-torch pyproject.toml setup.py
	@echo "Installing fisnet_cuda"
	@$(PIP) install --quiet -c constraints.txt $(PIP_ARGS) $(BUILD_NEEDS)
	@FISNET_CUDA_BUILD=0 $(PIP) install --quiet -c constraints.txt $(PIP_ARGS) --no-build-isolation -e .
	@rm -f fisnet_cuda/_build_note.txt
	@touch $@

$(VENV)/.ready-demo $(VENV)/.ready-bench: $(VENV)/.ready-%: $(VENV)/.ready-build
	@echo "Installing what 'make $*' needs"
	@$(PIP) install --quiet -c constraints.txt $(PIP_ARGS) 'fisnet_cuda[$*]'
	@touch $@

# pytorchcv asks for torchvision, which would bring another torch with it; the parts that the tests use need neither.
$(VENV)/.ready-test: $(VENV)/.ready-build
	@echo "Installing what 'make test' needs"
	@$(PIP) install --quiet -c constraints.txt $(PIP_ARGS) 'fisnet_cuda[test]'
	@$(PIP) install --quiet -c constraints.txt $(PIP_ARGS) --no-deps pytorchcv
	@touch $@

# ---- An environment of yours (PYTHON=) -----------------------------------------------------------------------------

define CHECK_TORCH
import sys
if sys.version_info < (3, 10):
    sys.exit("fisnet_cuda needs Python 3.10 or newer; PYTHON= names %d.%d." % sys.version_info[:2])
try:
    import torch
except ImportError:
    sys.exit("The environment named by PYTHON= has no torch. Install it there, or leave PYTHON= out: make then builds "
             "an environment of its own.")
if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11):
    sys.exit("fisnet_cuda needs torch 2.11 or newer; the environment named by PYTHON= has %s." % torch.__version__)
endef
define LIST_MISSING
import importlib.util, sys
from importlib.metadata import distributions
have = {(d.metadata["Name"] or "").lower().replace("_", "-") for d in distributions()}
pairs = [need.partition(":") for need in sys.argv[1:] if need[0] != "@"]
missing = [name or module for module, _, name in pairs if importlib.util.find_spec(module) is None]
print(*missing, *(need[1:] for need in sys.argv[1:] if need[0] == "@" and need[1:] not in have))
endef
export CHECK_TORCH LIST_MISSING

use-build: NEEDS = $(BUILD_NEEDS)
use-demo:  NEEDS = $(DEMO_NEEDS)
use-bench: NEEDS = $(BENCH_NEEDS)
use-test:  NEEDS = $(TEST_NEEDS)

use-build use-demo use-bench use-test: use-%:
	@$(PY) --version >/dev/null 2>&1 || { echo "PYTHON=$(PYTHON) is not a Python interpreter." >&2; exit 1; }
	@$(PY) -c "$$CHECK_TORCH"
	@missing=$$($(PY) -c "$$LIST_MISSING" $(NEEDS)) && if [ -n "$$missing" ]; then \
	  echo "Installing into the environment named by PYTHON=: $$missing"; \
	  $(PIP) install --quiet $(PIP_ARGS) $$missing; fi
	@if [ "$*" = test ] && [ -n "$$($(PY) -c "$$LIST_MISSING" pytorchcv)" ]; then \
	  echo "Installing into the environment named by PYTHON=: pytorchcv"; \
	  $(PIP) install --quiet $(PIP_ARGS) --no-deps pytorchcv; fi
