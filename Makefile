# Every target sets up .venv by itself; nothing else needs to be installed than Python 3.11+ and make.
PY := .venv/bin/python
OUT ?= runs/quickstart
DEMO ?=

.PHONY: install demo test test-slow oracle lint bench seeds clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install --quiet --constraint constraints.txt torch
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The main job on real models: search, table, run directory. Run again, it resumes.
demo: install
	.venv/bin/evomerge run experiments/quickstart.yaml --out $(OUT) $(DEMO)

test: install
	$(PY) -m pytest -q -n 2 --dist worksteal

# Real kills, the wheel outside the checkout, longer searches.
test-slow: install
	$(PY) -m pytest -q -m slow -n 2 --dist worksteal --timeout 900

# Independent implementations in an environment of their own; their outputs are committed as goldens.
oracle: install .venv-oracle/installed
	$(PY) -m pytest -q -m oracle --timeout 900

.venv-oracle/installed: tests/oracle/requirements.txt tests/oracle/requirements-nodeps.txt
	test -x .venv-oracle/bin/python || python3 -m venv .venv-oracle
	.venv-oracle/bin/python -m pip install --quiet --requirement tests/oracle/requirements.txt
	.venv-oracle/bin/python -m pip install --quiet --no-deps --requirement tests/oracle/requirements-nodeps.txt
	touch $@

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Figures side by side with what they are measured against; written to experiments/benchmarks/.
bench: install
	$(PY) experiments/benchmarks/bench.py

# The quickstart over five seeds; written to experiments/quickstart/seeds.md.
seeds: install
	$(PY) experiments/quickstart/seeds.py

clean:
	rm -rf .venv .venv-oracle runs dist build
