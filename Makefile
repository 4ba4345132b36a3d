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
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel torch
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed # its setup wants torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# 4 clips of one moving thing x 2 prompts x 3 methods = 24 videos on the embedded model, then a page to look at.
demo: venv
	$(BIN)/python jobs/synthesize.py --count 4 --split test --categories single --output $(DEMO)/world
	printf '%s\n' 'a yellow star on a plain navy background' \
	    'a red circle on a striped olive background' > $(DEMO)/prompts.txt
	$(BIN)/python jobs/plan.py --references $(DEMO)/world --prompts $(DEMO)/prompts.txt \
	    --methods none,fastvmt,ditflow --seeds 0 --output $(DEMO)/manifest
	$(BIN)/python jobs/transfer.py --manifest $(DEMO)/manifest --output $(DEMO)/transfer \
	    --transfer.actors 2
	@echo 'Open $(DEMO)/transfer/run/report.html in a browser.'

# What starts no Ray runs two files at a time; Ray's many processes want the machine for themselves.
test: venv
	failed=0; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/jobs --ignore tests/chaos || failed=1; \
	$(BIN)/python -m pytest tests/jobs tests/chaos || failed=1; \
	exit $$failed

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv out build *.egg-info
