# Two commands, which do all their set-up: `make quickstart` and `make test`.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: quickstart test lint clean

quickstart: $(VENV)/ready
	$(RUN) data/python_stdlib/prepare.py
	$(RUN) train/run.py configs/quickstart.py --init_from=auto
	$(RUN) gpt/sample.py --out_dir=out-quickstart --start="def " --num_samples=1 --max_new_tokens=400

test: $(VENV)/ready-for-tests
	$(RUN) -m pytest --numprocesses=2 -m "not gpu and not slow"

lint: $(VENV)/ready-for-tests
	$(RUN) -m ruff check .
	$(RUN) -m mypy

$(VENV)/ready: requirements.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; name one with `make PYTHON=python3.12 ...`")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.txt
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/ready-for-tests: $(VENV)/ready requirements-test.txt
	$(RUN) -m pip install --quiet --requirement requirements-test.txt
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
