# make demo | test | bench | lint | format | clean. Everything happens in .venv, which is made once and re-used.
#
#   PYTHON=python3.12   the interpreter behind .venv
#   TORCH=torch==2.6.0  the torch to install; not used where $(PYTHON) already has a torch >= 2.4 (a GPU machine's own, say)
#   DEMO_ARGS, PYTEST_ARGS, BENCH_ARGS   passed on

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

BUILD_INPUTS := CMakeLists.txt pyproject.toml $(shell find csrc cmake -type f)
CPP_FILES = $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test bench lint format clean install

demo: install
	$(BIN)/python examples/train_lm.py $(DEMO_ARGS)

test: install
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: install
	$(BIN)/python -m benchmarks.selected $(BENCH_ARGS)

install: $(VENV)/.installed
	@$(BIN)/python -m nsa_cuda | sed -n 1,3p

$(VENV)/.tools: scripts/make_venv.py
	$(PYTHON) scripts/make_venv.py $(VENV) "$(TORCH)"
	@touch $@

# No build isolation: the second build is incremental, and a machine without a network can build too.
$(VENV)/.installed: $(VENV)/.tools $(BUILD_INPUTS)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[test,examples]'
	@touch $@

$(VENV)/.lint: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[dev]'
	@touch $@

lint: $(VENV)/.lint
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/clang-format -i $(CPP_FILES)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist $(VENV) examples/out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
