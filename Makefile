# make venv | demo | test | lint
PYTHON ?= python3
BIN := .venv/bin
DEMO := out/demo

.PHONY: venv demo test lint clean

venv: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# 4 clips x 2 prompts x 2 methods = 16 videos on the embedded model, then a page to look at.
demo: venv
	$(BIN)/python -m vmt_core.world $(DEMO)/clips
	printf '%s\n' 'a red ball on a blue floor' 'a yellow star at night' > $(DEMO)/prompts.txt
	$(BIN)/python jobs/plan.py --references $(DEMO)/clips --prompts $(DEMO)/prompts.txt \
	    --methods fastvmt,ditflow --seeds 0 --output $(DEMO)/manifest
	$(BIN)/python jobs/transfer.py --manifest $(DEMO)/manifest --output $(DEMO)/transfer \
	    --transfer.actors 2
	@echo 'Open $(DEMO)/transfer/run/report.html in a browser.'

test: venv
	$(BIN)/python -m pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv out build *.egg-info
