# make train   train the embedded model with the embedded reward, from nothing but Python
# make test    the tests, without the slow ones        make test-slow   the slow ones
# make test-slurm  jobs on a real Slurm of two nodes (fetches Debian's packages if Slurm is not installed)
# make test-nightly  more of them, which CI has no time for
# make test-extras  the tests against NeMo itself and torchao (installs the extras nemo and quantization, 600 MB more)
# make bench   training steps beside TRL's and a plain diffusers call's, 15 minutes at most (installs TRL in .venv/peers)
# make lint    ruff, mypy, shellcheck, hadolint        make clean       caches and builds; results/ and .venv stay
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Extra words:  make train ARGS="model.optim.lr=1e-4"   make test PYTEST_ARGS="-k plan -x"   make bench ARGS="--out DIR"
ARGS        ?=
PYTEST_ARGS ?=
# Test processes, each with one computing thread: small tensors gain nothing from more. 0: no extra processes (for pdb).
WORKERS     ?= 2
export TOKENIZERS_PARALLELISM ?= false
# Several test processes must not fight for cores with spinning threads; `make train`, alone, is half as fast again with.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest
# The tests of these marks: side by side, then one by one those that depend on time, ports or signals (again if one
# fails). That PYTEST_ARGS leaves nothing of one kind (pytest's status 5) is no failure, nothing of both is.
run_tests = @one=0; $(PYTEST) -n $(WORKERS) -m "$(1) and not alone" $(PYTEST_ARGS) || one=$$?; \
	if [ $$one -ne 0 ] && [ $$one -ne 5 ]; then exit $$one; fi; \
	other=0; $(PYTEST) -n 0 --reruns 1 -m "$(1) and alone" $(PYTEST_ARGS) || other=$$?; \
	if [ $$other -eq 5 ]; then exit $$one; fi; exit $$other

.PHONY: train bench test test-slow test-nightly test-slurm test-extras install-extras lint install reference clean
SOURCES_OF_INSTALLATION := pyproject.toml setup.py constraints.txt
SHELL_SCRIPTS := .ci/run $(wildcard docker/*.sh docker/*/*.sh examples/mm/slurm/*.sub)
DOCKERFILES := $(wildcard Dockerfile docker/Dockerfile.* docker/*/Dockerfile.*)

train: $(VENV)/.installed
	@number=1; while [ -e results/train_$$(printf %03d $$number) ]; do number=$$((number + 1)); done; \
	directory=results/train_$$(printf %03d $$number); echo "training into $$directory"; \
	$(BIN)/python examples/mm/stable_diffusion/train_sd_draftp.py exp_manager.explicit_log_dir=$$directory $(ARGS)

bench: $(VENV)/.installed $(VENV)/peers/.installed
	$(BIN)/python -m benchmarks.bench --peers $(VENV)/peers/bin/python $(ARGS)

test: $(VENV)/.installed-dev $(VENV)/reference/.installed
	$(call run_tests,not slow and not nightly)

test-slow: $(VENV)/.installed-dev
	$(call run_tests,slow)

test-nightly: $(VENV)/.installed-dev
	$(call run_tests,nightly)

test-slurm: $(VENV)/.installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python tests/slurm/run.py

# Last in CI, so that all the other tests run without these packages beside ours.
install-extras: $(VENV)/.installed-extras

test-extras: $(VENV)/.installed-extras
	NAD_REQUIRE_EXTRAS=1 $(PYTEST) -n $(WORKERS) -m extras $$(grep -l mark.extras tests/test_*.py) $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/shellcheck $(SHELL_SCRIPTS)
	$(BIN)/hadolint $(DOCKERFILES)
	$(BIN)/mypy

# Everything that the other targets need, without running any of them.
install: $(VENV)/.installed-dev

# Other people's implementations that tests compare with, where no ordinary import finds them (20 MB).
reference: $(VENV)/reference/.installed

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp file is newer than what it was installed from, so that a second `make` starts at once.
$(VENV)/.installed: $(SOURCES_OF_INSTALLATION) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(SOURCES_OF_INSTALLATION) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.installed

$(VENV)/reference/.installed: tests/reference/requirements.txt | $(BIN)/python
	rm -rf $(VENV)/reference
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --target $(VENV)/reference -r $<
	@touch $@

# What `make bench` compares with needs other versions than ours.
$(VENV)/peers/.installed: benchmarks/peers.txt | $(BIN)/python
	$(BIN)/python -m venv --clear $(VENV)/peers
	$(VENV)/peers/bin/python -m pip install --disable-pip-version-check -r $<
	@touch $@

$(VENV)/.installed-extras: $(SOURCES_OF_INSTALLATION) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev,nemo,quantization]"
	@touch $@ $(VENV)/.installed-dev $(VENV)/.installed
