# Every target makes what it needs by itself: a virtual environment with the torch asked for, built once and kept.
#
#   make demo                 convert examples/mla.py and train it with the emitted file
#   make test                 the tests, without those marked slow
#   make slow                 the slow ones
#   make fuzz                 10,000 random attentions with known rows, tried on the finder
#   make sweep                every model class of other packages: found, proved, counted; writes docs/sweep.md
#   make wild REPOS=folder    what a first command does on public repositories as they are; writes docs/wild.md
#   make strip                those with QK norm, stripped both ways; after a sweep; writes docs/qk_norm.md
#   make trainers             the tests of QuacK in other people's trainers, in an environment that has those
#   make bench                a training step with and without QuacK, and other ways to take it, on this CPU
#   make experiment           small models trained with QuacK and its rivals: about 3 hours on 2 cores; resumes
#   make docs                 the site, in site/; `make docs SERVE=1` shows it and follows changes
#   make lint                 ruff and mypy
#   make test TORCH=2.11.0    the same on another torch, in an environment of its own

DEFAULT_TORCH := 2.13.0
TORCH ?= $(DEFAULT_TORCH)
PYTHON ?= python3
VENV := .venv$(if $(filter-out $(DEFAULT_TORCH),$(TORCH)),-$(TORCH))
BIN := $(VENV)/bin
STAMP := $(VENV)/.made-with-torch-$(TORCH)

.PHONY: demo test slow trainers fuzz sweep wild strip bench experiment docs lint format setup clean
.DELETE_ON_ERROR:

setup: $(STAMP)

# torch goes first and is pinned by hand, so that no extra pulls in another one.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch==$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[hf,dev]" "torch==$(TORCH)"
	touch $@

# Threads that wait must not spin: on a busy machine that costs a multiple of the work.
demo: export OMP_WAIT_POLICY = passive
demo: $(STAMP)
	$(BIN)/quack-fx inspect examples/mla.py
	mkdir -p .demo
	$(BIN)/quack-fx convert examples/mla.py -o .demo/train_mla.py --force
	$(BIN)/python examples/train_text.py .demo/train_mla.py --model examples/mla.py:MLATransformer --steps 60

# One thread a worker: the workers already fill the cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# The trainers are 450 MB beside torch. torchtitan asks for older versions of what the others want, and runs with these.
TRAINERS_VENV := .venv-trainers
TRAINERS_STAMP := $(TRAINERS_VENV)/.made-with-torch-$(TORCH)
trainers: $(TRAINERS_STAMP)
	OMP_NUM_THREADS=1 $(TRAINERS_VENV)/bin/python -m pytest tests/test_trainers.py

$(TRAINERS_STAMP): pyproject.toml
	test -x $(TRAINERS_VENV)/bin/python || $(PYTHON) -m venv $(TRAINERS_VENV)
	$(TRAINERS_VENV)/bin/python -m pip install --quiet "torch==$(TORCH)"
	$(TRAINERS_VENV)/bin/python -m pip install --quiet --editable ".[hf,dev,trainers]" "torch==$(TORCH)"
	$(TRAINERS_VENV)/bin/python -m pip install --quiet torchdata tyro spmd_types==0.2.3 "torch==$(TORCH)"
	$(TRAINERS_VENV)/bin/python -m pip install --quiet --no-deps torchtitan==0.3.0 torch_checkpointing triton
	touch $@

# MODELS=500 tries fewer; each failure prints the command that shows its model.
MODELS ?= 10000
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.random_attention --models $(MODELS)

# The packages swept want a torch of their own, torchvision's: an environment for them alone.
# ONLY=swin sweeps what is called so; RESUME=1 goes on where a sweep was stopped; JOBS=8 for more processes.
SWEEP_VENV := .venv-sweep
SWEEP_STAMP := $(SWEEP_VENV)/.made-for-sweep
SWEEP_TORCH := torch==2.14.1 torchvision==0.29.1
SWEEP_PACKAGES := transformers==5.23.0 timm==1.0.31 diffusers==0.42.1 x-transformers==2.31.10 vit-pytorch==1.26.11
SWEEP_PACKAGES += open_clip_torch==3.3.0 kornia==0.9.0 scipy==1.17.1 torchaudio==2.11.0 pytest==9.2.0
JOBS ?= 2
ONLY ?=
sweep: $(SWEEP_STAMP)
	OMP_NUM_THREADS=1 $(SWEEP_VENV)/bin/python -m benchmarks.sweep --jobs $(JOBS) --only "$(ONLY)" \
		$(if $(RESUME),--resume) $(if $(ONLY),,--markdown docs/sweep.md)

# REPOS holds checkouts named owner+name of the repositories in benchmarks/wild.json; ONLY, RESUME and JOBS as above.
REPOS ?=
wild: $(STAMP)
	test -d "$(REPOS)" || { echo "make wild REPOS=folder-of-checkouts" >&2; exit 2; }
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.wild --repos "$(REPOS)" --jobs $(JOBS) --only "$(ONLY)" \
		$(if $(RESUME),--resume) $(if $(ONLY),,--markdown docs/wild.md)

strip: $(SWEEP_STAMP)
	$(SWEEP_VENV)/bin/python -m pytest -q -W ignore -k timm tests/test_strip_models.py tests/test_insert.py
	OMP_NUM_THREADS=1 $(SWEEP_VENV)/bin/python -m benchmarks.strip --jobs $(JOBS) --only "$(ONLY)" \
		$(if $(ONLY),,--markdown docs/qk_norm.md)

$(SWEEP_STAMP): pyproject.toml
	test -x $(SWEEP_VENV)/bin/python || $(PYTHON) -m venv $(SWEEP_VENV)
	$(SWEEP_VENV)/bin/python -m pip install --quiet $(SWEEP_TORCH)
	$(SWEEP_VENV)/bin/python -m pip install --quiet --editable . $(SWEEP_TORCH) $(SWEEP_PACKAGES)
	touch $@

bench: $(STAMP)
	$(BIN)/python -m benchmarks.step --markdown benchmarks/results/step_cpu.md

# MINUTES=9 stops after so many, and the same command goes on; LONG=1 for the long runs, JOBS=8 for more processes;
# RESULTS=mine.jsonl begins anew: runs of another Python or torch do not go into the same file.
MINUTES ?=
LONG ?=
RESULTS ?= benchmarks/results/stability_cpu.jsonl
experiment: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.stability run --jobs $(JOBS) --results $(RESULTS) \
		$(if $(MINUTES),--minutes $(MINUTES)) $(if $(LONG),--long)
	$(BIN)/python -m benchmarks.stability report --results $(RESULTS)

# The site is made from sources alone: an environment of its own, without torch.
DOCS_VENV := .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.made-for-docs
SERVE ?=
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs $(if $(SERVE),serve,build --strict)

$(DOCS_STAMP): pyproject.toml
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --upgrade pip  # groups of dependencies want 25.1
	$(DOCS_VENV)/bin/python -m pip install --quiet --group docs
	$(DOCS_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .demo build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
