# make demo              transparent pictures and layers from the tiny world that is included, on one sheet
# make test              checks and unit tests, on the newest and the oldest versions of what the extension meets
# make test-full         the unit tests with those that take minutes: more of the tiny world's pictures, training
# make forge             this checkout inside an installed Forge; ARGS="…" goes to Forge
# make forge-test        tests that drive a real Forge, one of each kind; forge-test-full has all of them, for hours
# make ui-test           tests that use the panel in a browser, on a real Forge's page; ui-test-full has all of them
# make bench             what decoding and injection cost beside others, 20 minutes on two cores; bench-full takes hours
# make clean             away with the environments and caches

PYTHON ?= python3
# The first that runs: a shim may be there with nothing behind it.
OLDEST_PYTHON ?= $(shell for each in python3.10 $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python) $(PYTHON); do \
	"$$each" -c "" 2>/dev/null && echo "$$each" && break; done)

.venv/oldest/ready: PYTHON := $(OLDEST_PYTHON)

define environment
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@
endef

.venv/demo/ready: examples/requirements.txt
	$(environment)

.venv/%/ready: tests/requirements-%.txt
	$(environment)

.PHONY: demo test lint test-newest test-oldest test-full forge forge-test forge-test-full ui-test ui-test-full bench bench-full clean
.PRECIOUS: .venv/%/ready

demo: .venv/demo/ready
	.venv/demo/bin/python examples/demo.py

test: lint test-newest test-oldest

lint: .venv/newest/ready
	.venv/newest/bin/ruff check
	.venv/newest/bin/ruff format --check
	.venv/newest/bin/mypy

# One thread each: the networks here are tiny, threads would only wait for one another. What numba compiles is compiled
# before, once.
PYTEST := -m pytest --quiet --numprocesses=auto --dist=loadfile
test-newest test-oldest: test-%: .venv/%/ready
	.venv/$*/bin/python -c "from lib_layerdiffuse.cpu.kernels import compiled; compiled()"
	OMP_NUM_THREADS=1 .venv/$*/bin/python $(PYTEST)

test-full: .venv/newest/ready
	OMP_NUM_THREADS=1 .venv/newest/bin/python $(PYTEST) -m ""

forge:
	$(PYTHON) tools/forge.py run $(ARGS)

forge-test: .venv/forge/ready
	.venv/forge/bin/python -m pytest tests/forge -m brief

forge-test-full: .venv/forge/ready
	.venv/forge/bin/python -m pytest tests/forge -m ""

# The browser first: where there is none, it is installed.
ui-test ui-test-full: .venv/page/ready
	.venv/page/bin/python tools/browser.py
	.venv/page/bin/python -m pytest tests/page -m "$(if $(filter ui-test,$@),brief)"

# Without a Forge (FORGE_DIR), decoding alone.
bench: .venv/bench/ready
	.venv/bench/bin/python -m benchmarks.decode
	.venv/bench/bin/python -m benchmarks.injection --quick
	.venv/bench/bin/python -m benchmarks.report

bench-full: .venv/bench/ready
	.venv/bench/bin/python -m benchmarks.decode --full
	.venv/bench/bin/python -m benchmarks.injection --full
	.venv/bench/bin/python -m benchmarks.report

clean:
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
