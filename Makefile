# Everything runs in .venv, made on first use; a second run reuses it until pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TEST_PROCESSES ?= 2
PYTEST = $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
READY := $(VENV)/.ready

.PHONY: help venv quickstart quickstart-full test test-services test-faults test-faults-short test-slurm soak soak-loader random-runs random-models lint clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

venv: $(READY)  ## create the environment

# mosaicml-streaming requires numpy < 2.2 and transformers < 5, which conflicts with our versions. It is installed in a
# separate folder, where its tests (tests/mosaic.py) find it. Nothing else needs it.
MOSAIC := mosaicml-streaming brotli catalogue cramjam python-snappy xxhash zstd

# The tests of the Triton kernels also run on a CPU, in separate processes. A CUDA build of torch includes triton; with a
# CPU build it is installed in a separate folder, so that torch.compile finds the same packages as without it.
TRITON := triton==3.6.0

# torch first, alone: the same line takes a CPU or a CUDA build, whichever fits the machine; the rest is then held to it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	( grep -v '^torch==' constraints.txt; $(BIN)/pip freeze | grep '^torch==' ) > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev,data,deepspeed,s3,serve,tensorboard,wandb]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt --no-deps --upgrade --target $(VENV)/mosaic $(MOSAIC) \
		|| echo "mosaicml-streaming cannot be installed here: the tests that let it read MDS will be skipped"
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/triton $(TRITON) \
		|| echo "triton cannot be installed here: the tests of the Triton kernels will be skipped"
	touch $(READY)

quickstart: $(READY)  ## clips -> shards -> latents -> training, killed and resumed -> videos and a report
	$(BIN)/latte-scale quickstart

quickstart-full: $(READY)  ## the same, trained until colour, shape and direction are right
	$(BIN)/latte-scale quickstart --full

test: $(READY)  ## ruff and all tests except services and the fault suite; needs no root
	$(BIN)/ruff check .
	$(PYTEST) -m "not service"

test-services: $(READY)  ## the tests on a real S3 service and a real Slurm, short form (root; 5 minutes)
	$(PYTEST) -m service

test-slurm: $(READY)  ## every event of a cluster's job, on a real Slurm on this machine (root; 25 minutes)
	$(BIN)/python -m pytest -s -o python_files='*.py' tests/slurm

test-faults: $(READY)  ## the fault suite: kills, hangs, full disks, bitwise resume (minutes, on an idle machine)
	LATTE_FAULT_TESTS=1 $(BIN)/python -m pytest tests/faults tests/doctor

# Without what measures time or memory, or hits a run at a random moment.
test-faults-short: $(READY)  ## the part of the fault suite that a busy machine can run (2 minutes)
	LATTE_FAULT_TESTS=1 $(PYTEST) $(addprefix tests/faults/test_, bitwise.py faults_are_covered.py numbers.py saving.py saving_in_s3.py)

soak: $(READY)  ## 200 random kills on three engines; every run compared bitwise with an uninterrupted one
	$(BIN)/python -m tests.faults.soak --kills 200

soak-loader: $(READY)  ## 100,000 batches of a tiny data set, watching the memory of every process (5 minutes)
	$(BIN)/python -m benchmarks.loader_soak

random-runs: $(READY)  ## 200 random data sets read back; 40 random settings, stopped and resumed (12 minutes)
	$(BIN)/python -m tests.data_tools.random_clips --seeds 0 200
	$(BIN)/python -m tests.faults.random_runs --seeds 0 40

random-models: $(READY)  ## 300 random models: exported, imported, sampled from every source (2 minutes)
	LATTE_RANDOM_MODELS=0:300 $(PYTEST) tests/test_random_models.py

lint: $(READY)  ## ruff
	$(BIN)/ruff check .

clean:  ## remove caches; keeps the environment, and runs/ with its checkpoints
	rm -rf .pytest_cache .hypothesis .ruff_cache
