# Every target makes the virtual environment it needs; a second run finds it ready.

PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
WORKERS ?= 3

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTEST := $(PY) -m pytest -q -n $(WORKERS) --dist worksteal

.PHONY: help demo test check docs parity fault slow browser score evaluate routing bench clean

help:
	@echo "make demo    install, and answer five questions with the embedded model on eight devices"
	@echo "make test    the tests (TESTS=tests/test_config.py for a part, WORKERS=4 for more processes)"
	@echo "make check   format, lint, types, import contract, guards: what CI and pre-commit run"
	@echo "make docs    the documentation site, in build/site: links checked, nothing from outside"
	@echo "make parity  the comparisons with torch, transformers, bitsandbytes and mistral-common"
	@echo "make fault   kills and corruptions, many times over"
	@echo "make slow    every mesh strategy with every dispatch: minutes"
	@echo "make browser  the chat page in chromium (apt-get install chromium)"
	@echo "make score   exact answers of the embedded model on held-out prompts, f32 and bf16"
	@echo "make evaluate  perplexity, exact answers and expert loads of the embedded model, in the quick schemes"
	@echo "make routing what the embedded model's experts are for: writes docs/routing-tiny.md"
	@echo "make bench   the quick benchmarks"
	@echo "make clean   remove $(VENV) and the caches"
	@echo "PYTHON=python3.12 picks the interpreter, VENV=folder the environment"

demo: $(STAMP)-core
	$(PY) -m mixtral_jax.sample --mesh 1x8 --chat --show-experts \
	  --prompt "What is 12 + 30?" \
	  --prompt "Quelle est la capitale de la France ?" \
	  --prompt "Zähle von 3 bis 9." \
	  --prompt "¿Cómo se dice «rojo» en inglés?" \
	  --prompt "Quale giorno viene dopo lunedì?"

test: $(STAMP)-test
	$(PYTEST) $(TESTS)

check: $(STAMP)-check
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright --pythonpath $(PY)
	$(VENV)/bin/lint-imports
	$(PY) -m pytest -q tests/test_guards.py

docs: $(STAMP)-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

fault: $(STAMP)-test
	$(PYTEST) -m fault $(TESTS)

slow: $(STAMP)-test
	MIXTRAL_JAX_TEST_OPTIMIZED=1 $(PYTEST) -m slow $(TESTS)

browser: $(STAMP)-browser
	$(PYTEST) -m browser $(TESTS)

parity: $(STAMP)-parity
	MIXTRAL_JAX_TEST_OPTIMIZED=1 $(PYTEST) -m parity $(TESTS)

score: $(STAMP)-test
	@status=0; for dtype in float32 bfloat16; do \
	  echo "== $$dtype"; $(PY) -m examples.tiny.score --dtype $$dtype || status=$$?; \
	done; exit $$status

evaluate: $(STAMP)-test
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && set -e; \
	$(PY) -m examples.tiny.data "$$folder" --per-family 6 --lines 400; \
	$(PY) -m mixtral_jax.evaluate perplexity --text "$$folder/text.txt" --context 256 \
	  --schemes float32,bfloat16,int8,fp8,int4,nf4,fp4 --data "$$folder/questions.jsonl" --chat; \
	$(PY) -m mixtral_jax.evaluate routing --text "$$folder/text.txt" --context 256

routing: $(STAMP)-test
	$(PY) -m examples.tiny.routing docs

bench: $(STAMP)-parity
	@set -e; for script in $(wildcard benchmarks/[a-z]*.py); do \
	  echo "== $$script"; $(PY) $$script --quick; \
	done

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of extras, older than pyproject.toml whenever that changes.
$(PY):
	$(PYTHON) -m venv $(VENV)

$(STAMP)-core: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --editable .
	@touch $@

$(STAMP)-test: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --editable ".[test]"
	@touch $@

$(STAMP)-check: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --editable ".[test,check]"
	@touch $@

$(STAMP)-browser: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --editable ".[test,browser]"
	@touch $@

$(STAMP)-docs: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --editable ".[docs]"
	@touch $@

$(STAMP)-parity: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --editable ".[test,parity]"
	@touch $@
