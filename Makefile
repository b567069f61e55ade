# make venv | demo | test | style | quality | docs | wheel | bundle | clean
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE := optimum_mobilequant tests examples benchmarks .ci

# Tests and demo need no network: a hub request in them is a fault and fails at once.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

.PHONY: venv demo test style quality docs wheel bundle clean
.DELETE_ON_ERROR:

venv: $(STAMP)

# torch goes first, alone: it is by far the largest download, and a failure there should show at once.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt needs Python 3.11 or newer: make venv PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,crosscheck]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps aimet-onnx
	@touch $@

demo: venv
	$(OFFLINE) $(BIN)/python examples/demo.py --out demo-out

# One torch thread in each of the two workers: more would fight over the cores.
test: quality
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

quality: venv
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

style: venv
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: venv
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .

# Before "wheel": compiled kernels go into it, and it is one for this platform.
bundle: venv
	$(BIN)/python -m optimum_mobilequant.kernels.bundle

clean:
	rm -rf optimum_mobilequant/kernels/bundled build dist demo-out .pytest_cache .ruff_cache .mypy_cache .hypothesis
