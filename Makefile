# `make demo` and `make test` prepare what they need (see scripts/setup.sh), then do their job.
#
#   VENV=.venv           where the virtual environment goes
#   PYTHON=python3.11    the interpreter it is made from (3.11 or newer)
#   PY=python3           use this interpreter as it is, and install nothing
#   ARGS="--episodes 4"  passed on to `vla-pruner demo` or `vla-pruner bench`
#   LIBERO_ASSETS=FILE   meshes and textures for `make libero`, where they cannot be downloaded
#   OUT=bench-results    where `make bench` and `make gpu` put their tables

VENV ?= .venv
PY ?= $(VENV)/bin/python
OUT ?= bench-results
ARGS ?=
export PYTHON
export LIBERO_ASSETS
export PYTHONPATH := src$(if $(PYTHONPATH),:$(PYTHONPATH))

ifeq ($(PY),$(VENV)/bin/python)
  SIM := $(VENV)/.installed-sim
  DEV := $(VENV)/.installed-dev
endif
# Processes for pytest: small models gain nothing from more than one thread each.
JOBS := $(shell n=$$(nproc 2>/dev/null || echo 1); [ $$n -gt 4 ] && n=4; echo $$n)

.DEFAULT_GOAL := help
.PHONY: help demo test test-lerobot models lint format bench libero gpu clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

demo: $(SIM)  ## a small policy picks by language, with all and with a quarter of its visual tokens
	$(PY) -m vla_pruner demo $(ARGS)

test: lint  ## lint, types and tests on the CPU
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile -m "not gpu" $(ARGS)

test-lerobot: $(VENV)-lerobot/.installed  ## lerobot's own policy classes, in their own environment
	OMP_NUM_THREADS=1 $(VENV)-lerobot/bin/python -m pytest -q tests/lerobot_policies --record $(ARGS)

models: $(DEV)  ## the table of tested models, from the tests that fill it
	OMP_NUM_THREADS=1 $(PY) -m pytest -q --record tests/models tests/surgery $(ARGS)
	$(PY) -m vla_pruner models --markdown > docs/models.md

lint: $(DEV)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(DEV)  ## let ruff rewrite the sources
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(SIM)  ## full model against pruned ones, side by side, on this CPU
	$(PY) -m vla_pruner bench --out $(OUT)/cpu.json --out $(OUT)/cpu.md $(ARGS)

libero: $(SIM)  ## LIBERO in the same environment; LIBERO_ASSETS=FOLDER_OR_ARCHIVE where there is no hub
	INSTALL=$(if $(SIM),1,0) scripts/libero.sh $(PY)

gpu: $(DEV)  ## GPU tests, then the bench at full size, eager and compiled
	@$(PY) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else \
	  'make gpu needs an NVIDIA GPU that torch can use; torch ' + torch.__version__ + ' sees none here. ' \
	  'On the CPU, run: make test bench')"
	$(PY) -m pytest -q -m gpu
	for model in openvla-oft-7b openvla-7b; do \
	  for mode in "" --compile; do \
	    $(PY) -m vla_pruner bench --device cuda --methods vla-pruner,fastv \
	      --model $$model $$mode $(ARGS) --out $(OUT)/$$model$$mode.json --out $(OUT)/$$model$$mode.md || exit 1; \
	  done; \
	done

clean:  ## remove the virtual environment, caches and results
	rm -rf .venv .venv-lerobot bench-results demo-report build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# lerobot pins its own torch and transformers, and the newest one needs Python 3.12.
LEROBOT_PYTHON ?= python3.12
LEROBOT ?= lerobot[pi,smolvla]==0.6.1
$(VENV)-lerobot/.installed: Makefile
	$(LEROBOT_PYTHON) -m venv $(VENV)-lerobot
	$(VENV)-lerobot/bin/python -m pip install --disable-pip-version-check "$(LEROBOT)" pytest rich
	@touch $@

$(VENV)/.installed-sim: pyproject.toml constraints.txt scripts/setup.sh
	scripts/setup.sh $(VENV) sim
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-sim
	scripts/setup.sh $(VENV) sim,dev
	@touch $@
