# Each target sets up what it needs: a virtual environment in .venv, built once and again when its inputs change.
#   make PYTHON=python3.12 ...      another interpreter
#   make test PYTEST_ARGS="-k gate" part of the tests

PYTHON ?= python3
PYTEST_ARGS ?= -n 2
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
PIP := $(PY) -m pip --disable-pip-version-check
TYPED := harmonica_rt kernels/harmonica_kernels training/harmonica_training
LINTED := $(TYPED) tests setup.py docs/site_pages.py $(wildcard benchmarks)

# Lint and documentation are checked side by side. The tests start many processes, which read the bytecode of the first.
MAKEFLAGS += --jobs=2
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-all lint docs format sanitize triton-versions bench train-digits train-emoji train-schedule clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 16

demo: $(STAMP)  ## sample the small model that is included, plain and compiled, and compare
	$(VENV)/bin/harmonica-rt demo

test: lint docs  ## lint, the documentation, then the tests that this machine can run
	$(PY) -m pytest $(PYTEST_ARGS)

test-all: lint docs  ## the same with every member of the sweeps that `make test` samples (marked exhaustive)
	$(PY) -m pytest -m "" $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(PY) -m ruff check $(LINTED)
	$(PY) -m ruff format --check $(LINTED)
	$(PY) -m mypy $(TYPED)

# Without --quiet, under which MkDocs counts no warnings and --strict does nothing.
docs: $(STAMP)  ## build the documentation into site/; a broken link or reference fails
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

format: $(STAMP)  ## rewrite the sources as ruff formats them
	$(PY) -m ruff check --fix $(LINTED)
	$(PY) -m ruff format $(LINTED)

# Leaks are not looked for: CPython frees little when it ends. With its allocator replaced, freed objects are noticed.
# libstdc++ comes with libasan, which must see it to catch what torch throws.
SANITIZED_TESTS := tests/model/test_identity.py tests/model/test_tensor_notes.py \
	$(addprefix tests/kernels/test_,forecast.py gated_residual.py lazy_tensors.py norm_rotary.py residual_reuse.py \
	residual_reuse_norm_modulate.py weights.py)
sanitize: $(STAMP)  ## run the tests of the C++ extension under AddressSanitizer and UBSan, in a build of its own
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; trap 'exit 130' INT TERM; \
	echo "[1/2] a build of csrc with sanitizers"; \
	CXX="$(CXX)" HARMONICA_BUILD_CSRC=1 \
		HARMONICA_BUILD_ARGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" \
		$(PY) setup.py -q build --build-base "$$folder/build" --build-lib "$$folder/lib"; \
	echo "[2/2] its tests"; \
	PYTHONPATH="$$folder/lib" HARMONICA_SANITIZED="$$folder" PYTHONMALLOC=malloc OMP_NUM_THREADS=2 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(PY) -m pytest -p no:cacheprovider -q $(SANITIZED_TESTS)

# The launchers, the machine code and the results in the interpreter. The environment keeps the Triton that it has.
TRITON_VERSIONS := 3.4.0 3.6.0 3.7.1 3.8.0 3.5.1
TRITON_TESTS := $(addprefix tests/kernels/test_triton_,launcher.py ahead_of_time.py interpreter.py)
triton-versions: $(STAMP)  ## run the tests of the Triton kernels with every minor version of Triton since 3.4
	@set -e; for version in $(TRITON_VERSIONS); do \
		folder="$(CURDIR)/build/triton-$$version"; \
		test -d "$$folder/triton" || $(PIP) install -q --no-deps --target "$$folder" "triton==$$version"; \
		export PYTHONPATH="$$folder" TRITON_CACHE_DIR="$$folder/cache"; \
		$(PY) -c "import triton; print('Triton', v := triton.__version__); raise SystemExit(v != '$$version')"; \
		$(PY) -m pytest -p no:cacheprovider -q -rs $(TRITON_TESTS); \
	done

bench: $(STAMP)  ## run the benchmarks
	$(PY) -m benchmarks $(BENCH_ARGS)

train-digits: $(STAMP)  ## train the small model that the demo uses, from nothing
	$(PY) -m harmonica_training.digits

train-emoji: $(STAMP)  ## train the small text-to-image model (hours; it resumes): docs/emoji-model.md
	OMP_NUM_THREADS=1 $(PY) -m harmonica_training.emoji train

MODEL := harmonica_rt/demo/digits-dit
train-schedule: $(STAMP)  ## learn the schedule of that model that the demo uses
	OMP_NUM_THREADS=1 $(VENV)/bin/harmonica-rt train $(MODEL) $(MODEL)/schedule.json \
		--steps 20 --target-speedup 1.5 --guidance 2 --iterations 16 --batch 2 --validation-batches 4 \
		--learning-rate 0.2

clean:  ## remove the environment and all build outputs
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f kernels/harmonica_kernels/_C.so kernels/harmonica_kernels/_C.build.json
	find $(LINTED) -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and by its pin: the later steps then find it installed and leave it alone, and csrc is compiled
# against it (--no-build-isolation).
$(STAMP): constraints.txt setup.py pyproject.toml $(wildcard csrc/*)
	@echo "[1/4] virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make needs Python 3.11 or newer; say PYTHON=...")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "[2/4] torch and build tools"
	$(PIP) install -q -c constraints.txt setuptools wheel
	$(PIP) install -c constraints.txt $$(grep '^torch==' constraints.txt)
	@echo "[3/4] dependencies and harmonica-rt with its C++ extension (two minutes or so)"
	HARMONICA_BUILD_CSRC=1 $(PIP) install -q --no-build-isolation -c constraints.txt -e '.[train,test,lint,docs]'
	@echo "[4/4] what was built"
	$(PY) -c "import harmonica_kernels as k; print(k.build_info()); raise SystemExit(not k.build_info().extension)"
	@touch $@
