# Everything runs in .venv, which the first target that needs it makes. CI (.ci/run) calls the same targets.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV = $(shell uv --version >/dev/null 2>&1 && echo uv || echo .tools/bin/uv)

.PHONY: help setup check format test demo bench lock build proof hyperopt clean

help:
	@echo "make setup   make .venv with everything in it (PYTHON=... chooses the interpreter)"
	@echo "make check   lint, formatting, types"
	@echo "make format  apply the formatter and the lint fixes"
	@echo "make test    all tests that need no GPU (ARGS='-k name' selects)"
	@echo "make demo    fine-tune the shipped model on the shipped data and show the result"
	@echo "make bench   measure training steps on this CPU, beside stock Ludwig (a few minutes)"
	@echo "make lock    write requirements.lock anew (ARGS=--upgrade takes newer versions)"
	@echo "make build   wheel and sdist in dist/"
	@echo "make proof   install the wheel into a fresh environment, as pip install does, and use it"
	@echo "make hyperopt  search over adapter types with Optuna and with Ray, in an environment with both (a few minutes)"
	@echo "make clean   remove what these targets made, but not .venv"

setup: $(READY)

$(READY): pyproject.toml requirements.lock scripts/setup_env.sh ludwig_peft_plugin/autoload.pth ludwig_peft_plugin/autoload.start
	PYTHON="$(PYTHON)" bash scripts/setup_env.sh $(VENV)
	@touch $@

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

test: $(READY)
	$(BIN)/pytest -n auto --dist loadfile $(ARGS)

demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/demo.py

# Written to results/, which git ignores; the recorded numbers are in benchmarks/results.
bench: $(READY)
	$(BIN)/python benchmarks/cpu_quickstart.py results/bench/cpu_quickstart.json
	$(BIN)/python benchmarks/gpu/run.py --suite tiny --device cpu --models results/bench/models --out results/bench $(ARGS)

lock: $(READY)
	$(UV) pip compile pyproject.toml --group dev --universal --python-version 3.12 --python $(BIN)/python \
		--quiet --no-annotate --no-header --no-emit-index-url --no-emit-find-links \
		--output-file requirements.lock $(ARGS) > /dev/null

build: $(READY)
	rm -rf dist
	$(BIN)/python -m hatchling build

proof: build
	bash scripts/prove_install.sh $(BIN)/python

# Not part of CI: Ray and what it needs are another half gigabyte to install.
hyperopt: build
	bash scripts/prove_hyperopt.sh $(BIN)/python

clean:
	rm -rf dist build demo_output results api_results .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
