# Everything a newcomer needs: `make demo` and `make test`. Both set up .venv first.
#
#   TORCH=...   the torch build to install, any pip requirement (default below); for a GPU: make demo TORCH=torch
#   PYTHON=...  the Python to make .venv with (3.10 to 3.13)
#   JOBS=...    test processes (default: one per core, at most 4); 0 runs all tests in one
#   PROMPT=...  your own request for the demo: make demo PROMPT="How do I paint the fence?"

TORCH ?= torch==2.13.0
PYTHON ?= python3
PROMPT ?=
export PROMPT
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -gt 4 ] && echo 4 || echo $$n)

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
STAMP := $(VENV)/.ready
# A file's tests stay together: its fixtures compile kernels. One thread each, or the processes would fight for the cores.
# Files in the order of tests/conftest.py, the longest first; xdist's own order, by number of tests, leaves these to the end.
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder
TORCH_STAMP := $(VENV)/.torch
OLD_TRITON := $(VENV)/.triton-3.6
STACKS := $(VENV)/.stacks
STACK_PACKAGES := "kernels>=0.10" "litellm>=1.60" "lm_eval[api]>=0.4.10" "ray[serve,data]>=2.47"
SOURCES := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test test-slow test-asan lint format build wheel bench clean help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

demo: $(STAMP) ## RAIN answers three requests on the embedded model, beside plain sampling
	@$(VENV)/bin/raindecode demo -- $${PROMPT:+"$$PROMPT"}

test: $(STAMP) $(OLD_TRITON) $(STACKS) ## every test that needs no GPU
	@$(PYTEST)

test-slow: $(STAMP) $(OLD_TRITON) $(STACKS) ## the long sweeps as well
	@RAINKERNELS_FUZZ_CASES=2000 $(PYTEST) -m "slow or not slow"

test-asan: $(STAMP) ## the kernels' tests and 2,000 fuzzed calls of each op on a C++ lane with AddressSanitizer
	@RAINKERNELS_FUZZ_CASES=2000 $(PY) -m pytest tests/kernels/test_asan.py -m "slow or not slow" -s

lint: $(STAMP) $(STACKS) ## ruff, mypy (strict), clang-format
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(VENV)/bin/clang-format --dry-run --Werror

format: $(STAMP) ## rewrite files in the house style
	@$(VENV)/bin/ruff check --fix . ; $(VENV)/bin/ruff format .
	@find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(VENV)/bin/clang-format -i

build: $(STAMP) ## compile the extension in place

wheel: $(STAMP) ## dist/*.whl
	@$(PIP) wheel . --no-deps --no-build-isolation -w dist && ls -l dist

bench: $(STAMP) ## kernel benchmarks of this machine
	@$(PY) benchmarks/bench_kernels.py

clean: ## remove what was built; keeps .venv's packages
	rm -rf build dist *.egg-info rainkernels/_C*.so $(VENV)/triton-cache $(STAMP)

# torch goes in first and by itself: otherwise pip may choose another build of it for one of the packages below.
$(TORCH_STAMP):
	@sh scripts/check_system.sh "$(PYTHON)"
	@echo "[1/3] virtual environment and $(TORCH)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PIP) install "$(TORCH)"
	@touch "$@"

$(VENV)/.tools: $(TORCH_STAMP) pyproject.toml
	@echo "[2/3] Python packages"
	@$(PIP) install "setuptools>=77" wheel "pybind11>=3.0" "cmake>=3.26" ninja
	@touch "$@"

# The oldest Triton the kernels must compile under, beside the installed one. It is there for one test only, which says so
# when it is missing: a machine that cannot have it still runs everything else.
$(OLD_TRITON): $(TORCH_STAMP)
	@if [ "$$(uname -sm)" != "Linux x86_64" ]; then \
	  echo "Triton 3.6 has no wheel for $$(uname -sm): its compile test is skipped"; touch "$@"; \
	elif $(PIP) install --no-deps --only-binary :all: --target $(VENV)/triton-3.6 --upgrade triton==3.6.0; then touch "$@"; \
	else echo "Triton 3.6 could not be installed: its compile test is skipped"; fi

# Other stacks, for the tests of our plug-ins in them; many packages, so that one that cannot be had is no reason to stop.
$(STACKS): $(STAMP) Makefile
	@if $(PIP) install $(STACK_PACKAGES) > $(VENV)/stacks.log 2>&1; then :; \
	else echo "Ray, LiteLLM, lm-evaluation-harness or kernels could not be installed: their tests are skipped ($(VENV)/stacks.log)"; fi
	@touch "$@"

$(STAMP): $(VENV)/.tools $(SOURCES)
	@echo "[3/3] compiling rainkernels (log: $(VENV)/build.log)"
	@$(PIP) install --no-build-isolation -e ".[dev]" --verbose > $(VENV)/build.log 2>&1 || { tail -n 25 $(VENV)/build.log; exit 1; }
	@grep -h "rainkernels:" $(VENV)/build.log | sort -u | sed 's/^ *//' || true
	@touch "$@"
