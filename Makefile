# `make demo` and `make test` prepare what they need (see scripts/setup.sh), then do their job.
#
#   VENV=.venv           where the virtual environment goes
#   PYTHON=python3.11    the interpreter it is made from (3.11 or newer)
#   PY=python3           use this interpreter as it is, and install nothing
#   ARGS="--episodes 4"  passed on to `vla-pruner demo` or `vla-pruner bench`
#   LIBERO_ASSETS=FILE   meshes and textures for `make libero`, where they cannot be downloaded
#   OUT=bench-results    where `make bench` and `make gpu` put their tables
#   OPENPI=FOLDER        a checkout of openpi for `make test-openpi`, instead of the registry's copy

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
# Processes for pytest: small models gain nothing from more than one thread each, and some tests wait.
JOBS := $(shell n=$$(nproc 2>/dev/null || echo 1); [ $$n -lt 3 ] && n=$$((n + 1)); [ $$n -gt 4 ] && n=4; echo $$n)

# lerobot pins its own torch and transformers. The newest needs Python 3.12; the newest for 3.11:
#   make test-lerobot LEROBOT_PYTHON=python3.11 LEROBOT="lerobot[smolvla]==0.4.4" LEROBOT_WITH="peft dm-tree"
# (its own list for GR00T builds flash-attn, which these tests do not need). LEROBOT_PATCH=FOLDER copies
# files over those of transformers, which pi0 of lerobot 0.4 asks for (docs/lerobot.md).
LEROBOT_PYTHON ?= python3.12
LEROBOT ?= lerobot[pi,smolvla,groot,async,core-scripts,evaluation]==0.6.1
LEROBOT_WITH ?=
LEROBOT_PATCH ?=
LEROBOT_ENV := $(VENV)-lerobot-$(lastword $(subst ==, ,$(LEROBOT)))
# Clients of robots with pins of their own (openpi-client wants numpy below 2).
CLIENTS := openpi-client==0.1.2 typing_extensions json-numpy==2.1.1 requests "pyzmq>=26" msgpack "websockets>=14" "numpy<2"
CLIENTS_ENV := $(VENV)-clients
RAY_ENV := $(VENV)-ray
DOCS_ENV := $(VENV)-docs
TRACKERS_ENV := $(VENV)-trackers
# openpi's own entry at the registry is empty; rlinf-openpi is its class, and rlinf-transformer-openpi
# the transformers that it patches. With a checkout, OPENPI=FOLDER, its files are copied over those.
OPENPI ?=
OPENPI_PYTHON ?= python3.11
OPENPI_NEEDS ?= torch==2.13.0 jax==0.5.3 flax==0.10.2 jaxtyping==0.2.36 beartype==0.19.0 einops \
  augmax sentencepiece typing_extensions "numpy<2" chex tyro tqdm-loggable ml_collections numpydantic \
  openpi-client==0.1.2
OPENPI_REGISTRY := rlinf-openpi==0.1.1
OPENPI_ENV := $(VENV)-openpi$(if $(OPENPI),-checkout)
# Prints the folder of transformers.
TRANSFORMERS := -c 'import os, transformers; print(os.path.dirname(transformers.__file__))'

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-clients test-ray test-lerobot test-openpi test-composing test-trackers notebooks models docs lint format bench libero gpu gpu-rehearsal clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

demo: $(SIM)  ## a policy picks by language, with all, half and a quarter of its visual tokens
	$(PY) -m vla_pruner demo --policy smol-oft $(ARGS)

test: lint  ## lint, types and tests on the CPU
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile -m "not gpu and not slow" $(ARGS)

test-all: lint  ## the same, with the tests that compile or try a great many inputs
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile -m "not gpu" --hypothesis-profile default $(ARGS)

test-clients: $(CLIENTS_ENV)/.installed $(DEV)  ## the clients of openpi, OpenVLA and GR00T against our doors, 200 observations each
	OMP_NUM_THREADS=1 CLIENTS_PYTHON=$(CLIENTS_ENV)/bin/python $(PY) -m pytest -q -rs tests/real_clients $(ARGS)

test-ray: $(RAY_ENV)/.installed  ## episodes and replicas on a Ray cluster of two nodes, one of which is killed
	OMP_NUM_THREADS=1 $(RAY_ENV)/bin/python -m pytest -q -rs tests/runs/test_ray.py tests/serving/test_ray_replicas.py tests/serving/test_rerun_log.py $(ARGS)

test-lerobot: $(LEROBOT_ENV)/.installed  ## lerobot's own policy classes, in their own environment
	OMP_NUM_THREADS=1 $(if $(wildcard $(PY)),VLA_PRUNER_PYTHON=$(PY)) \
	  $(LEROBOT_ENV)/bin/python -m pytest -q -rs tests/lerobot_policies \
	  tests/models/pi0/test_pi0_originals.py --record $(ARGS)

test-openpi: export PYTHONPATH := $(PYTHONPATH)$(if $(OPENPI),:$(OPENPI)/src)
test-openpi: $(OPENPI_ENV)/.installed $(DEV)  ## openpi's own PyTorch class, from the registry or a checkout: OPENPI=FOLDER
	OMP_NUM_THREADS=1 $(OPENPI_ENV)/bin/python -m pytest -q -rs tests/openpi_policies --record $(ARGS)
	OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 $(OPENPI_ENV)/bin/python -m pytest -q -rs tests/openpi_policies $(ARGS)
	OMP_NUM_THREADS=1 $(OPENPI_ENV)/bin/python tests/openpi_policies/tiny_openpi.py $(OPENPI_ENV)/reference
	OMP_NUM_THREADS=1 OPENPI_REFERENCE=$(OPENPI_ENV)/reference \
	  $(PY) -m pytest -q tests/models/pi0/test_pi0_originals.py -k openpi

models: $(DEV)  ## the table of tested models, from the tests that fill it
	OMP_NUM_THREADS=1 $(PY) -m pytest -q --record tests/models tests/core $(ARGS)
	$(PY) -m vla_pruner models --markdown > docs/models.md

lint: $(DEV)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(DEV)  ## let ruff rewrite the sources
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(DOCS_ENV)/.installed  ## the documentation site, in site/; fails on a warning
	NO_MKDOCS_2_WARNING=1 $(DOCS_ENV)/bin/python -m mkdocs build --strict --quiet --site-dir site

test-trackers: $(TRACKERS_ENV)/.installed  ## reports in the real Trackio and W&B, offline
	$(TRACKERS_ENV)/bin/python -m pytest -q -rs --noconftest tests/reports/test_trackers.py

notebooks: $(DEV)  ## the notebooks of examples/, as notebooks
	$(PY) -m pip install --disable-pip-version-check -q nbclient ipykernel
	OMP_NUM_THREADS=1 $(PY) -m jupyter execute examples/*.ipynb

test-composing: $(DEV)  ## with LoRA, quantised weights, offloading: what docs/composing.md says
	$(PY) -m pip install --disable-pip-version-check -q "peft>=0.15" "torchao>=0.9" "optimum-quanto>=0.2.7"
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -rs tests/composing

bench: $(SIM)  ## full model against pruned ones, side by side, on this CPU
	$(PY) -m vla_pruner bench --out $(OUT)/cpu.json --out $(OUT)/cpu.md $(ARGS)

libero: $(SIM)  ## LIBERO in the same environment; LIBERO_ASSETS=FOLDER_OR_ARCHIVE where there is no hub
	INSTALL=$(if $(SIM),1,0) scripts/libero.sh $(PY)

gpu: $(DEV)  ## everything a GPU has to show, in ten minutes at most
	$(PY) scripts/gpu.py --out $(OUT)/gpu $(ARGS)

gpu-rehearsal: $(DEV)  ## the same lines on the CPU, with tiny models
	$(PY) scripts/gpu.py --out $(OUT)/gpu-rehearsal --rehearse $(ARGS)

clean:  ## remove the virtual environment, caches and results
	rm -rf .venv .venv-clients .venv-ray .venv-lerobot-* .venv-openpi* .venv-docs .venv-trackers site bench-results demo-report build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(LEROBOT_ENV)/.installed: Makefile
	$(LEROBOT_PYTHON) -m venv $(LEROBOT_ENV)
	$(LEROBOT_ENV)/bin/python -m pip install --disable-pip-version-check \
	  "$(LEROBOT)" $(LEROBOT_WITH) pytest hypothesis rich "websockets>=14" msgpack
	$(if $(LEROBOT_PATCH),cp -r "$(LEROBOT_PATCH)"/* "$$($(LEROBOT_ENV)/bin/python $(TRANSFORMERS))")
	@touch $@

$(CLIENTS_ENV)/.installed: Makefile
	$(if $(PYTHON),$(PYTHON),python3) -m venv $(CLIENTS_ENV)
	$(CLIENTS_ENV)/bin/python -m pip install --disable-pip-version-check $(CLIENTS)
	@touch $@

# Ray and Rerun over what the other environment holds.
$(RAY_ENV)/.installed: Makefile $(DEV)
	$(PY) -m venv $(RAY_ENV)
	$(RAY_ENV)/bin/python -m pip install --disable-pip-version-check -q "ray>=2.40" "rerun-sdk>=0.23"
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(RAY_ENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vla-pruner.pth"
	@touch $@

$(DOCS_ENV)/.installed: Makefile
	$(or $(PYTHON),python3) -m venv $(DOCS_ENV)
	$(DOCS_ENV)/bin/python -m pip install --disable-pip-version-check -q mkdocs-material==9.8.2 "mkdocstrings[python]==1.0.8" ruff
	@touch $@

$(TRACKERS_ENV)/.installed: Makefile
	$(or $(PYTHON),python3) -m venv $(TRACKERS_ENV)
	$(TRACKERS_ENV)/bin/python -m pip install --disable-pip-version-check -q numpy pillow pytest trackio==0.43.0 wandb==0.31.0
	@touch $@

$(OPENPI_ENV)/.installed: Makefile
	$(OPENPI_PYTHON) -m venv $(OPENPI_ENV)
	$(OPENPI_ENV)/bin/python -m pip install --disable-pip-version-check pytest hypothesis rich $(OPENPI_NEEDS) \
	  $(if $(OPENPI),transformers==4.53.2,rlinf-transformer-openpi==4.53.2)
	$(if $(OPENPI),cp -r "$(OPENPI)"/src/openpi/models_pytorch/transformers_replace/* \
	  "$$($(OPENPI_ENV)/bin/python $(TRANSFORMERS))",$(OPENPI_ENV)/bin/python -m pip install \
	  --disable-pip-version-check --no-deps $(OPENPI_REGISTRY))
	@touch $@

$(VENV)/.installed-sim: pyproject.toml constraints.txt scripts/setup.sh
	scripts/setup.sh $(VENV) sim,smol
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-sim
	scripts/setup.sh $(VENV) sim,smol,dev
	@touch $@
