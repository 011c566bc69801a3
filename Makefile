# What a contributor and CI call. Needs git, make and a Python >= 3.11 with venv; everything else comes from PyPI.
#
#   make setup     .venv with all that is locked; PYTHON=... chooses the interpreter
#   make demo      a real data set analysed in a sandbox
#   make test      the tests; ARGS="-k name" narrows them
#   make fuzz      frames from a fuzzer, for SECONDS=60
#   make soak      SESSIONS=2000 with faults at random; ARGS="--seed N" and the like
#   make check     lint, format, types, lock
#   make cases     the tests of the containment cases, and their table in docs/cases.md
#   make bench     the measurements of the docs; those of Docker where there is an engine for them
#   make clean     remove all that this file makes

SHELL := /bin/sh
.PHONY: setup demo test fuzz soak check cases bench clean FORCE

PYTHON ?=
ARGS ?=
SECONDS ?= 60
SESSIONS ?= 2000
UV := .tools/bin/uv
# Of the caller's shell these would lead uv to another environment, or leave ours without bytecode, which a sandbox that
# shows it read-only could never add.
CLEAN_ENV := env -u PYTHONDONTWRITEBYTECODE -u PYTHONPYCACHEPREFIX -u PYTHONHOME -u PYTHONPATH \
	-u VIRTUAL_ENV -u CONDA_PREFIX -u UV_PROJECT_ENVIRONMENT -u UV_PYTHON

setup: .venv/.complete

# The stamp is younger than all that decides what .venv holds, so nothing is done when nothing changed; an interpreter
# chosen on the command line is always looked at.
.venv/.complete: pyproject.toml uv.lock Makefile $(if $(filter command,$(origin PYTHON)),FORCE)
	@set -eu; \
	chosen=; \
	for python in $(if $(PYTHON),'$(PYTHON)',python3.13 python3.12 python3.11 python3); do \
	  if chosen=$$("$$python" -c 'import ensurepip, sys, venv; print(sys.executable); sys.exit(sys.version_info < (3, 11))' 2>/dev/null); \
	  then break; else chosen=; fi; \
	done; \
	if [ -z "$$chosen" ]; then \
	  echo "no Python >= 3.11 with venv found; install one (Debian: python3 python3-venv) or set PYTHON=" >&2; exit 1; \
	fi; \
	echo "setup: using $$chosen"; \
	if ! $(UV) --version >/dev/null 2>&1; then \
	  rm -rf .tools; \
	  $(CLEAN_ENV) "$$chosen" -m venv .tools; \
	  $(CLEAN_ENV) .tools/bin/python -m pip install --quiet --disable-pip-version-check 'uv~=0.13.9'; \
	fi; \
	$(CLEAN_ENV) $(UV) sync --locked --all-extras --all-groups --compile-bytecode --python "$$chosen"; \
	touch $@

demo: setup
	.venv/bin/python examples/demo.py

test: setup
	.venv/bin/python -m pytest $(ARGS)

fuzz: setup
	.venv/bin/python tests/fuzz_frames.py --seconds $(SECONDS)

soak: setup
	.venv/bin/python benchmarks/soak.py --sessions $(SESSIONS) $(ARGS)

check: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright
	$(UV) lock --check

cases: setup
	.venv/bin/python -m pytest --cases=docs/cases.md $(ARGS)

bench: setup
	.venv/bin/python benchmarks/bench.py
	.venv/bin/python benchmarks/bench_forks.py
	-.venv/bin/python benchmarks/bench_docker.py

clean:
	rm -rf .venv .tools .pytest_cache .ruff_cache .hypothesis dist
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
