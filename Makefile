# Every target sets itself up: it creates .venv and fills it from PyPI when pyproject.toml or constraints.txt changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test soak lint types check clean

help:
	@echo "make demo   run the main job on what is bundled; results in out/demo/"
	@echo "make test   lint, types and all tests"
	@echo "make soak   an hour of simulated driving as fast as the node goes: memory, threads, lost frames"
	@echo "make lint | types | clean"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else f"Python 3.11 or 3.12 is required, $(PYTHON) is {v[0]}.{v[1]}; set PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[ros,tools,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/flashdrive demo --out out/demo

lint: $(STAMP)
	$(BIN)/ruff check src tests launch ros2_ws
	$(BIN)/ruff format --check src tests launch ros2_ws

types: $(STAMP)
	$(BIN)/mypy

# Two at a time: one takes what starts ROS processes, which mostly waits, the other what computes.
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadgroup

soak: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m support.soak --minutes 60

clean:
	rm -rf $(VENV) out build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
