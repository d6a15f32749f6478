# make demo | bench | test | lint | clean: each makes the virtual environment first, if it is not there.
# Without a GPU, the CPU wheels of torch are smaller: make test TORCH_INDEX=<index url of the CPU wheels>

PYTHON      ?= python3
VENV        ?= .venv
TORCH_INDEX ?=
EXTRAS      ?= dev
PYTEST_ARGS ?=
DEMO_ARGS   ?=
BENCH_ARGS  ?=
VERSIONS_ARGS ?=

BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
LINKS   := build/typecheck/kvarn_ops
FOLDERS := kernels lowering export

.DEFAULT_GOAL := help
.PHONY: help install demo bench test kernels-full lint format typecheck-tree versions release-check clean

help:
	@echo "make demo      dense against KVarN on the model in examples/byte_model (DEMO_ARGS=...)"
	@echo "make bench     all CPU benchmarks, their plots and tables: 20 minutes (BENCH_ARGS=--quick)"
	@echo "make test      all tests (PYTEST_ARGS=...)"
	@echo "make lint      ruff and pyright"
	@echo "make format    let ruff rewrite the sources"
	@echo "make kernels-full  compile the kernels for all GPUs, presets and widths: 70 minutes of CPU time"
	@echo "make versions  the tests under other versions, and the README's table (VERSIONS_ARGS=...)"
	@echo "make release-check  build dist/ and try it as a user gets it (docs/releasing.md)"
	@echo "make clean     remove $(VENV) and everything generated"
	@echo "Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  TORCH_INDEX=<index url of the CPU wheels of torch>"

install: $(STAMP)

# A CPU wheel (2.13.0+cpu) sorts above the plain release of the same number, so pip takes it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "Python 3.10 or newer is needed, this is %d.%d: make PYTHON=..." % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt $(addprefix --extra-index-url ,$(TORCH_INDEX)) -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)
	$(BIN)/kvarn-ops demo $(DEMO_ARGS)

# The peers are no dependency of anything else; --no-build-isolation: hqq's setup imports torch.
bench: $(STAMP)
	$(BIN)/python -m pip install -c constraints.txt optimum-quanto ninja termcolor einops
	$(BIN)/python -m pip install --no-deps --no-build-isolation hqq
	$(BIN)/python benchmarks/run_all.py $(BENCH_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

kernels-full: $(STAMP)
	$(BIN)/python benchmarks/kernels_static.py --full

lint: $(STAMP) typecheck-tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Links in the shape of the installed package, for pyright.
typecheck-tree:
	@rm -rf $(LINKS) && mkdir -p $(LINKS)
	@ln -s $(addprefix $(CURDIR)/,$(filter-out %__pycache__,$(wildcard kvarn_ops/*)) $(FOLDERS)) $(LINKS)/

# Both make environments of their own.
versions:
	$(PYTHON) tests/versions.py $(addprefix --torch-index ,$(TORCH_INDEX)) $(VERSIONS_ARGS)

release-check:
	PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" .ci/release-check

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find kvarn_ops $(FOLDERS) tests benchmarks examples docs -name __pycache__ -type d -prune -exec rm -rf {} +
