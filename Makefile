# `make help` lists what can be done. Needs Python 3.11, make and a C compiler; the rest goes into .venv.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
SECONDS ?= 60
RESULTS ?= build/bench
BEFORE ?= $(RESULTS)/core.json
SANITIZERS ?= address,undefined

RUN := $(abspath $(VENV))/bin/python
# A Python that is asked for is the one that is used, or it is said.
WHICH := -c 'import sys; print(sys.version_info[:2])'
ifeq ($(origin PYTHON) $(wildcard $(RUN)),command line $(RUN))
ifneq ($(shell $(PYTHON) $(WHICH)),$(shell $(RUN) $(WHICH)))
$(error $(VENV) is not of $(PYTHON): make $(MAKECMDGOALS) PYTHON=$(PYTHON) VENV=.venv-$(notdir $(PYTHON)))
endif
endif
# Of an environment that has what serving needs, and of one that has what tests and benchmarks need as well.
SERVING := $(VENV)/serving.stamp
DEVELOPING := $(VENV)/developing.stamp
SOURCES := pyproject.toml setup.py $(wildcard fastwire/_core.pyx fastwire/core/*)
# Not quiet: minutes of silence look like a hang.
PIP := $(RUN) -m pip install --disable-pip-version-check
SERVER := $(PIP) --editable '.[lab]'
DEVELOPER := $(PIP) --editable '.[lab,bench,test,dev]'
SITE := $(PIP) --quiet --editable '.[site]'
# Where only serving was asked for there is no Cython: pip brings it for the build.
COMPILE = echo "compiling the core"; if $(RUN) -c 'import Cython' 2>/dev/null; \
	then $(RUN) setup.py --quiet build_ext --inplace --force; else $(PIP) --quiet --no-deps --editable .; fi
# Where threads meet: the standby reader with the loop, the disk's with the log, finalizers and hashlib with anything.
THREADED := $(addprefix tests/test_,$(addsuffix .py,core_threads core_counters core_zmtp standby zmtp zmtp_ends zmtp_failures \
	channels turns compiled_turn output_first executor concurrency disk disk_failures shelf segments hanging_disk))
# What the tests need, for a build that must not touch the one in the source tree.
TREE := $(wildcard *.md *.in *.toml *.yml *.py LICENSE Makefile bench docs etc fastwire fuzz tests tools)
COPY = rm -rf build/$@ && mkdir -p build/$@ && cp -R $(TREE) build/$@ && cd build/$@

.PHONY: help install serve test portable pythons arm conformance lint format bench figures bench-core bench-check load sanitize tsan coverage soak fuzz upstream nightly docs site dist clean
.NOTPARALLEL:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

install: $(DEVELOPING) ## .venv with all a developer needs; quick when nothing changed

$(RUN):
	@command -v $(PYTHON) >/dev/null || { echo "fastwire needs Python 3.11 or newer: no $(PYTHON) on PATH"; exit 1; }
	@$(PYTHON) tools/preflight.py
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# A new pyproject.toml means new dependencies; new sources only compile again, once for both.
$(SERVING): $(SOURCES) | $(RUN)
	@$(if $(filter pyproject.toml,$?),echo "installing JupyterLab and the core: a minute or two"; $(SERVER),$(COMPILE))
	@touch $@ $(if $(filter pyproject.toml,$?),,$(wildcard $(DEVELOPING)))

$(DEVELOPING): $(SOURCES) | $(RUN)
	@$(if $(filter pyproject.toml,$?),echo "installing all for tests and benchmarks: two minutes"; $(DEVELOPER),$(COMPILE))
	@touch $(SERVING) $@

serve: $(SERVING) ## a Jupyter server on fastwire: make serve ARGS="--port 9999"
	$(RUN) -m fastwire.serve $(ARGS)

test: install ## all tests, or some: make test ARGS="tests/test_core_signer.py -k sha"
	$(if $(CI),tools/twice.sh) $(RUN) -m pytest $(ARGS)

portable: install ## the core's tests on a core without SSE2 and SHA instructions, in build/portable
	$(COPY) \
	&& FASTWIRE_PORTABLE=1 $(RUN) setup.py --quiet build_ext --inplace \
	&& PYTHONPATH=. $(RUN) -m pytest --timeout=300 $(or $(ARGS),-q tests/test_core*.py)

pythons: install ## each Python at hand: its wheel built, installed, tried, in build/pythons: make pythons ARGS="3.13"
	$(RUN) tools/pythons.py $(ARGS)

arm: install ## the core's tests on ARM, by qemu in a Debian root that is made once, in build/arm-root; needs root
	$(COPY) && tools/arm.sh $(RUN) $(or $(ARGS),-q tests/test_core*.py)

conformance: install ## RFC 6455 case by case: make conformance ARGS="--targets fastwire,tornado -v"
	$(RUN) tests/conformance $(ARGS)

lint: install ## style, types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	PATH=$(abspath $(VENV))/bin:$$PATH cython-lint fastwire

format: install ## rewrite Python files to the style
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: bench-core ## everything against the stock code, in ten minutes: results in build/bench, one table of ratios
	$(RUN) -m bench.echo --json $(RESULTS)/echo.json
	$(RUN) -m bench.latency --target jupyter_server,fastwire --json $(RESULTS)/latency.json
	$(RUN) -m bench.load --target jupyter_server,fastwire --protocol legacy --repeat 2 --seconds 5 \
	    --cells 1x50,16x100,64x100 --json $(RESULTS)/load.json
	$(RUN) -m bench.ratios $(RESULTS)/core.json $(RESULTS)/latency.json $(RESULTS)/load.json $(RESULTS)/echo.json

figures: install ## README's tables and pictures, measured anew where ARGS=--anew: ten quiet minutes
	$(RUN) -m bench.readme $(ARGS)

bench-core: install ## time the core's functions: make bench-core ARGS="-k sign"
	mkdir -p $(RESULTS)
	$(RUN) -m pytest bench --benchmark-json=$(RESULTS)/core.json $(ARGS)

bench-check: install ## is the core slower than in a saved run? make bench-check BEFORE=saved.json
	@test -e $(BEFORE) || { echo "no saved run: make bench-core, and keep $(RESULTS)/core.json"; exit 1; }
	$(RUN) -m pytest bench -q --benchmark-json=$(RESULTS)/check.json $(ARGS)
	$(RUN) -m bench.compare $(BEFORE) $(RESULTS)/check.json

load: install ## many kernels and clients against a server: make load ARGS="--help"
	$(RUN) -m bench.load $(ARGS)

sanitize: install ## the tests on a core built with ASan and UBSan, in build/sanitize
	$(COPY) \
	&& FASTWIRE_SANITIZE=$(SANITIZERS) $(RUN) setup.py --quiet build_ext --inplace \
	&& tools/sanitized.sh tools/twice.sh $(RUN) -m pytest --capture=sys -m "not memory" $(ARGS)

tsan: install ## the tests of what has threads, on a core built with ThreadSanitizer, in build/tsan
	$(COPY) \
	&& CC=gcc FASTWIRE_SANITIZE=thread $(RUN) setup.py --quiet build_ext --inplace \
	&& FASTWIRE_SLOW=10 CC=gcc tools/sanitized.sh $(RUN) -m pytest --capture=sys -m "not memory" $(or $(ARGS),-q $(THREADED))

coverage: install ## which lines of the core the tests reach, in build/coverage
	$(COPY) \
	&& FASTWIRE_COVERAGE=1 $(RUN) setup.py --quiet build_ext --inplace \
	&& PYTHONPATH=. $(RUN) -m pytest --timeout=300 $(ARGS) \
	&& $(RUN) tools/core_coverage.py

soak: install ## ten minutes of clients that come, stall and vanish, and ten behind a hub's proxy: do memory and descriptors stay flat?
	FASTWIRE_SOAK_SECONDS=600 $(RUN) -m pytest tests/test_soak.py

fuzz: install ## feed the core hostile bytes: make fuzz SECONDS=600
	$(RUN) -m fuzz.run --seconds $(SECONDS)

upstream: install ## the tests of Jupyter and Tornado, on their classes and on ours: make upstream ARGS="--help"
	$(RUN) tools/upstream/run.py $(ARGS)

nightly: install ## what takes hours: long fuzz, soak, the whole load matrix
	HYPOTHESIS_PROFILE=nightly $(MAKE) test ARGS="--timeout=3600"
	FASTWIRE_TEST_PATH=libzmq $(MAKE) test
	$(MAKE) sanitize
	$(MAKE) tsan
	HYPOTHESIS_PROFILE=nightly $(MAKE) tsan ARGS="-q --timeout=900 tests/test_blocked.py -k short"
	$(MAKE) arm
	tools/more_pythons.sh 3.14 3.15 3.13t
	$(MAKE) pythons
	$(MAKE) upstream
	$(MAKE) soak
	$(MAKE) fuzz SECONDS=7200
	$(MAKE) load ARGS="--target fastwire --kernels 64 --rate 10 --seconds 3600"
	$(MAKE) load ARGS="--matrix --seconds 60 --repeat 1 --protocol legacy --json $(RESULTS)/matrix.json"
	$(RUN) -m bench.latency

docs: install ## rewrite the references in docs/ from docstrings and settings
	$(RUN) tools/api.py
	$(RUN) tools/architecture.py
	$(RUN) tools/configuration.py
	$(RUN) tools/states.py

site: install ## the documentation as a site with a search, in build/site; dead links fail it
	@$(RUN) -c 'import mkdocs' 2>/dev/null || $(SITE)
	$(RUN) tools/site.py

dist: install ## sdist, and the wheel built from it, in dist/
	rm -rf dist
	$(RUN) -m build
	$(RUN) tools/repair_wheel.py

clean: ## remove what was built (not .venv)
	rm -rf build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f fastwire/*.so fastwire/_core.c fastwire/_core.html $(SERVING) $(DEVELOPING)
	find bench fastwire fuzz tests tools -name __pycache__ -exec rm -rf {} + 2>/dev/null || true
