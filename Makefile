# The two commands a newcomer needs: `make demo` and `make test`. Each installs what is missing first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

.PHONY: help demo test lint docs faults fuzz benchmark clean

help:
	@echo "make demo    install into $(VENV), then make scenes, a teacher, labels, three students, a report (demo/report.html)"
	@echo "make test    install, then run the CPU test suite"
	@echo "make faults  install, inject every fault at full counts (ten minutes), write docs/reliability.md"
	@echo "make fuzz    install, then five minutes of random damage to each of stores, recipes, image lists, checkpoints"
	@echo "make benchmark  install, measure every part beside what one would use instead (an hour), write docs/benchmarks.md"
	@echo "make lint    install, then ruff and mypy, the same as CI"
	@echo "make docs    install, then the documentation as a site (site/index.html), strictly: a broken link fails"
	@echo "make clean   remove what the demo and the documentation wrote"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}. Try: make PYTHON=python3.12 …")'
	@echo "installing into $(VENV) (about 7 GB the first time, a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/python -m scripts.demo --out demo

test: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

faults: $(READY)
	$(BIN)/python -m scripts.faults

fuzz: $(READY)
	for target in store recipe image-list checkpoint; do $(BIN)/python -m scripts.fuzz $$target --minutes 5 || exit 1; done

benchmark: $(READY)
	$(BIN)/python -m scripts.benchmark

clean:
	rm -rf demo site
