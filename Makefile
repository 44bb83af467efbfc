# Every target makes its own virtual environment in .venv; python3 (3.11 or newer, with venv) is all that has to be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE OPENBLAS_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadscope

.DELETE_ON_ERROR:
.PHONY: help parity test test-all lint clean

help:
	@echo "make parity   compare both implementations with every oracle bundle; report in reports/latest/"
	@echo "make test     run the tests"
	@echo "make test-all  run more of what they show in part: every fault, every bundle"
	@echo "make lint     run ruff"
	@echo "make clean    remove .venv, the reports and caches"

parity: $(INSTALLED)
	$(BIN)/lance-parity run

test: $(INSTALLED)
	$(PYTEST)

test-all: $(INSTALLED)
	$(PYTEST) --all

lint: $(INSTALLED)
	$(BIN)/ruff check .

# The dependencies are installed again when pyproject.toml changes; the packages themselves are editable.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "lance-mlx needs Python 3.11 or newer as $(PYTHON); name another one with PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Installing lance-mlx[parity,test] into $(VENV): several hundred MB with the CPU build of PyTorch,"
	@echo "several GB on Linux where pip chooses its CUDA build (README.md says how to avoid that)."
	@$(PYTHON) -m venv $(VENV) \
	    || { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[parity,test]'
	@touch $@

clean:
	rm -rf $(VENV) reports/latest reports/localize build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
