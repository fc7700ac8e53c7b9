"""Imported by the fork server: what engines on a CPU need, in an environment as the scripts prepare it."""

import contextlib
import importlib

from common.engine import prepare_environment, quiet
from common.gpu import detect

quiet()
prepare_environment(detect())
for name in (
    "vllm",
    "transformers",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "vllm.v1.engine.llm_engine",
):
    with contextlib.suppress(Exception):  # a script that needs what is missing says so
        importlib.import_module(name)
