# Needs Python 3.11 or later with venv, g++ and make; everything else is installed into .venv.
#   make demo    set up, train the default configuration on the embedded digits, show the table
#   make test    set up, then formatting, lint, types and the tests; make test-all leaves none out (an hour)
#   make wheel   dist/ddst-*.whl          make format   rewrite the sources in the project's format
#   make bench   what is to be reached    make clean    remove builds and caches (not .venv, not runs)
#   make docs    the guide, in build/docs: part of make test
#   make record-kernels  compile what changed since tests/**/{compiled,resources,recorded}.json were written, and write them
#   make test-newest     the tests that need no compiled kernels with the newest torch and Triton, in a venv of their own
#   make test-oldest     the dry run of `make gpu` with the oldest torch, in a venv of its own (several GB)
#   make test-arm        cross-compile for Arm (aarch64), try the CPU kernels on an emulated processor: part of test-all
#   make paper   train the paper's methods on the embedded data, keep each run's JSON, build docs/results.md (days; in parts:
#                make paper ONLY='goal digits' STEPS=800 SEEDS=3 HOURS=8; ONLY=goal ARGS=--time, or --page-only, --list)
#   make gpu     prove and measure the library on a GPU: with any python3 that has torch and CMake, no network, no .venv;
#                at most 7 minutes, a second call from what the first compiled and proved at most 5
#                (make gpu PYTHON=… ARGS='--only correctness --budget 120 --out DIR')

PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3))
VENV ?= .venv
# Pinned, as the newest may be a CUDA build of several GB. Any torch >= 2.11 works: make TORCH=torch==2.11.0
TORCH ?= torch==2.13.0
OUT ?= runs/demo

BIN := $(VENV)/bin
CXX_SOURCES := $(shell find csrc tests -name "*.[ch]" -o -name "*.[ch]pp" -o -name "*.cu" -o -name "*.cuh")
BUILD_FILES := setup.py CMakeLists.txt $(shell find csrc -type f)

# Threads that wait go to sleep. OpenMP's default, waiting busily, costs several times the time where other programs want
# the cores too (measured: 0.70 s a step instead of 0.13 s on a busy machine of two cores).
demo test test-all test-arm paper: export OMP_WAIT_POLICY ?= passive

# Set up for tests, nvcc compiles for one architecture: what it makes for the others is recorded in
# tests/cuda/resources.json, and compiled by the tests where that no longer holds. Elsewhere it compiles for all.
test test-all test-arm test-newest test-oldest record-kernels lint check-format check-lint check-types docs: export DDST_CUDA_ARCHS ?= 90-real

.PHONY: demo test test-all test-arm arm-tools test-newest test-oldest record-kernels lint check-format check-lint check-types docs format wheel bench bench-layers paper gpu clean
.DELETE_ON_ERROR:

# A run is never overwritten: the second demo goes to runs/demo-2.
demo: $(VENV)/built
	@out=$(OUT); n=1; while [ -e "$$out" ]; do n=$$((n + 1)); out=$(OUT)-$$n; done; \
	echo "$(BIN)/ddst train --out $$out"; exec $(BIN)/ddst train --out "$$out"

# In the order of tests/conftest.py, long files first, so that both processes end at about the same time.
PYTEST := $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=20

# What can be done at once is: packages while the library compiles, types while the guide is built.
test:
	@$(MAKE) --no-print-directory -j 2 --output-sync=target lint docs
	$(PYTEST) -m "not torture"

# Every kernel is compiled, every randomised test tries all it has, and the torture suite runs.
test-all: export DDST_TEST_ALL = 1
test-all: arm-tools
	@$(MAKE) --no-print-directory -j 2 --output-sync=target lint docs
	$(PYTEST)

test-arm: export DDST_TEST_ALL = 1
test-arm: $(VENV)/built arm-tools
	$(BIN)/pytest -q -rs tests/cpu tests/benchmarks/test_bench_neoverse.py

arm-tools:
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64 llvm-mca-19; do command -v $$tool > /dev/null || \
	echo "make: no $$tool, so tests for Arm are skipped: apt-get install g++-aarch64-linux-gnu qemu-user llvm-19"; done

test-newest: $(VENV)/built
	$(BIN)/python -P tests/newest.py --write

test-oldest: $(VENV)/built
	$(BIN)/python -P tests/newest.py --torch 2.11.0 tests/benchmarks/test_bench_gpu.py

record-kernels: $(VENV)/built
	$(BIN)/python -P -m ddst.kernels.compile --json tests/kernels/compiled.json
	PYTHONPATH=tests $(BIN)/python -P tests/helpers/cuda_resources.py
	DDST_TEST_RECORD=1 $(BIN)/pytest -q tests/cuda

lint: check-format check-lint check-types

check-format: $(VENV)/packages
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

check-lint: $(VENV)/packages
	$(BIN)/ruff check .

check-types: $(VENV)/packages
	$(BIN)/mypy

# Every page is read anew (-E), as one that was read before warns no more.
docs: $(VENV)/built
	$(BIN)/sphinx-build -q -E -n -W --keep-going docs build/docs

format: $(VENV)/built
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_SOURCES)

wheel: $(VENV)/built
	$(BIN)/pip wheel --no-deps --no-build-isolation --wheel-dir dist .

# The table, and each figure beside another build: make bench ONLY='linear share' AGAINST=main, or AGAINST= for none.
AGAINST ?= HEAD
bench: $(VENV)/built
	$(BIN)/python -P -m ddst.benchmarks goals $(if $(ONLY),--only $(ONLY)) $(if $(AGAINST),--against $(AGAINST))

bench-layers: $(VENV)/built
	$(BIN)/pytest -q benchmarks/bench_layers.py --benchmark-min-rounds=3 --benchmark-max-time=0.3 \
		--benchmark-group-by=group --benchmark-columns=min,median,iqr,rounds
	$(BIN)/python -P -m ddst.benchmarks

# One thread a run; a second part in another shell takes the other core.
paper: $(VENV)/built
	@$(BIN)/python -P -m ddst.benchmarks paper $(if $(ONLY),--only $(ONLY)) $(if $(STEPS),--steps $(STEPS)) \
		$(if $(SEEDS),--seeds $(SEEDS)) $(if $(HOURS),--hours $(HOURS)) --results benchmarks/results/paper \
		--page docs/results.md $(ARGS)

# Nothing is installed: what python3 has is used, not .venv, and the library runs from this tree.
gpu: PYTHON = python3
gpu:
	@$(PYTHON) -P benchmarks/gpu/run.py $(ARGS)

# Without compiling to bytecode, which an import does for what it needs: a third of the time.
# torch first, and the build without isolation: an isolated one would download torch a second time.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("ddst needs Python 3.11 or later, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import tomllib; \
		needs = tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"]; \
		print("$(TORCH)", *(n for n in needs if not n.startswith("torch")), sep="\n")' > $(VENV)/build-requires.txt
	$(BIN)/pip install --no-compile -r $(VENV)/build-requires.txt
	touch $@

# What the extras ask for.
EXTRAS := train dev docs bench integrations onnx live
$(VENV)/packages: $(VENV)/installed pyproject.toml
	$(BIN)/python -c 'import tomllib; \
		project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*project["dependencies"], *(n for e in "$(EXTRAS)".split() for n in project["optional-dependencies"][e]), sep="\n")' \
		> $(VENV)/requires.txt
	$(BIN)/pip install --no-compile -r $(VENV)/requires.txt
	$(BIN)/pip install --no-compile --no-deps torch-fidelity==0.4.0 # its torchvision asks for a build of torch of its own
	touch $@

$(VENV)/compiled: $(VENV)/installed $(BUILD_FILES)
	$(BIN)/pip install --no-compile --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/built: $(VENV)/packages $(VENV)/compiled
	touch $@

clean:
	rm -rf build dist *.egg-info ddst/_lib/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)/built $(VENV)/compiled
