"""vLLM's settings for this machine: the same script runs on a laptop and on eight GPUs.

Call `prepare_environment` before anything imports vllm (it reads its environment at import).
"""

import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from common.cli import CannotRun, first_line
from common.gpu import Machine, versions
from common.models import Model, kv_bytes_per_token, parameter_count, tensor_parallel_size, why_not_sharded

if TYPE_CHECKING:  # importing vLLM takes seconds, and reads the environment that prepare_environment sets
    from vllm import LLM

GPU_MEMORY_UTILIZATION = 0.90  # the chapter's: the rest is for CUDA graphs, NCCL and other processes
CPU_KV_CACHE_BYTES = 2**30  # vLLM would take 92% of the RAM, and fills with zeros what it takes, 2 s a GiB
# What in vLLM uses NVLink multicast if not told otherwise, for a host whose environment has turned it off in NCCL.
NO_MULTICAST = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm"}


def prepare_environment(machine: Machine, ranks: int = 1) -> None:
    """Set vLLM's environment variables, except those the user has set.

    `ranks`: as far as they are known before the model is. CannotRun: the installed vLLM is the one for GPUs.
    """
    if machine.device == "cpu" and "vllm" in versions():
        raise CannotRun("the installed vLLM is built for GPUs; leave --device cpu out, or run: make install GPU=0")
    variables = {
        "VLLM_NO_USAGE_STATS": "1",
        # A forked engine can deadlock on locks that threads of this process hold; a spawned one cannot.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if os.environ.get("NCCL_NVLS_ENABLE") == "0":
        variables |= NO_MULTICAST
    if machine.device == "cpu":
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # vLLM's binding wants a core for each rank and one more
        if ranks == 1:
            # No worker process: vllm.LLM runs all in this one, a server's engine computes in its own. That starts
            # sooner, and no processes take cores from the computing by spinning while they wait for each other.
            variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        else:  # a sharded embedding would be compiled, which needs a C++ compiler on this machine
            variables["TORCHDYNAMO_DISABLE"] = "1"
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def quiet() -> None:
    """Let vLLM's libraries report errors only: a lesson is not a log."""
    import logging
    import warnings

    logging.getLogger("torch").setLevel(logging.ERROR)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # of torch.profiler
    os.environ.setdefault("TORCH_LOGS", "-all")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # for the processes that vLLM starts
    for category in (FutureWarning, UserWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)


def use_fp8(machine: Machine, quantization: str) -> bool:
    """Whether weights are quantized to FP8: "auto" means where the GPU computes FP8. CannotRun: "fp8" without units."""
    if quantization == "fp8" and not machine.native_fp8:
        raise CannotRun(f"{machine.name} has no FP8 units (Ada, Hopper and newer GPUs do); use --quantization none")
    return quantization == "fp8" or (quantization == "auto" and machine.native_fp8)


def engine_args(model: Model, machine: Machine, *, max_model_len: int = 4096, **asked: object) -> dict[str, object]:
    """Arguments for `vllm.LLM` (or, as flags, for vLLM's server): the chapter's settings on this machine.

    `max_model_len`: prompt plus answer in tokens, cut to what the model can. `asked`: the keywords of `exceptions`.
    """
    settings: dict[str, object] = {
        "model": model.path,
        "max_model_len": max_model_len,
        "enable_prefix_caching": True,
        "enforce_eager": False,
        "gpu_memory_utilization": GPU_MEMORY_UTILIZATION,
        "quantization": "fp8",
        "kv_cache_dtype": "fp8",
    }
    settings |= exceptions(settings, model, machine, **asked)
    return {name: value for name, value in settings.items() if value is not None}


def exceptions(
    settings: Mapping[str, object],
    model: Model,
    machine: Machine,
    *,
    quantization: str = "auto",
    tensor_parallel: int | None = None,
    max_num_seqs: int | None = None,
) -> dict[str, object]:
    """Arguments of `vllm.LLM` that differ from `settings`, made for GPUs with FP8, for this model on this machine.

    None leaves an argument to vLLM's default.

    Args:
        quantization: "auto" (FP8 where the GPU computes it), "fp8" or "none". FP8 weights bring an FP8 KV cache.
        tensor_parallel: GPUs (or CPU ranks) per copy of the model; default: as many as the model divides into.
        max_num_seqs: sequences decoded together; default: vLLM's choice on a GPU, 32 on a CPU.

    Raises:
        CannotRun: FP8 without FP8 units, ranks beyond the GPUs or the model's heads, or weights beyond the memory.
    """
    # A checkpoint that is quantized already (AWQ, GPTQ, FP8, ...) says so itself, and is left as it is.
    fp8 = "quantization_config" not in model.config and use_fp8(machine, quantization)
    on_gpu = machine.device == "cuda"
    gpus = min(machine.count, settings.get("tensor_parallel_size", machine.count))
    ranks = tensor_parallel or (tensor_parallel_size(model.config, gpus) if on_gpu else 1)
    if on_gpu and ranks > machine.count:
        raise CannotRun(f"tensor parallelism over {ranks} GPUs, but this machine has {machine.count}")
    if why := why_not_sharded(model.config, ranks):
        raise CannotRun(f"{model.name} cannot be sharded: {why}")
    usable = machine.memory_bytes * settings["gpu_memory_utilization"]
    _check_memory(model, machine, ranks, usable, bytes_per_weight=1 if fp8 else machine.itemsize)

    longest = min(settings["max_model_len"], model.max_context)
    changes: dict[str, object] = {"tensor_parallel_size": ranks, "max_model_len": longest}
    if not on_gpu:
        changes["enforce_eager"] = True  # no kernel launches to save, and compiling would delay the start
        changes["gpu_memory_utilization"] = None
        # VLLM_CPU_KVCACHE_SPACE, where a user has set it, goes before
        changes["kv_cache_memory_bytes"] = _cpu_cache_bytes(model, machine, longest)
        if ranks == 1 and os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
            changes["distributed_executor_backend"] = "uni"
    if not machine.native_bf16:  # else as the checkpoint says
        changes["dtype"] = machine.dtype
    if not fp8:
        changes |= {"quantization": None, "kv_cache_dtype": None}
    if max_num_seqs or not on_gpu:
        changes["max_num_seqs"] = max_num_seqs or 32
    if model.dummy:
        changes |= {"load_format": "dummy", "skip_tokenizer_init": True}
    return changes


def _cpu_cache_bytes(model: Model, machine: Machine, longest: int) -> int:
    """KV cache per rank: the default, or more where a sequence of `longest` tokens needs it."""
    try:
        token = kv_bytes_per_token(model.config, machine.itemsize)
    except KeyError:  # a config of another family
        return CPU_KV_CACHE_BYTES
    spare = 2 * 128  # a block of vLLM-CPU that is not filled, and one that it keeps for itself
    return max(CPU_KV_CACHE_BYTES, (longest + spare) * token)


def _check_memory(model: Model, machine: Machine, ranks: int, usable: float, bytes_per_weight: int) -> None:
    parameters = parameter_count(model.config)
    if parameters is None or "quantization_config" in model.config:
        return
    if machine.device == "cpu":
        ranks = 1  # they share the RAM
    weights = parameters * bytes_per_weight / ranks
    if weights > usable:
        needed = f"{weights / 2**30:.0f} GiB of weights" + (f" on each of {ranks} GPUs" if ranks > 1 else "")
        device, remedy = ("this machine", "") if machine.device == "cpu" else ("a GPU", " or more GPUs")
        there = f"{device} has {usable / 2**30:.0f} GiB to use; take a smaller --model{remedy}"
        raise CannotRun(f"{model.name} does not fit: {needed}, {there}")


def as_flags(args: dict[str, object]) -> list[str]:
    """`engine_args` in the spelling of vLLM's command line."""
    flags = []
    for name, value in args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    return flags


@contextlib.contextmanager
def starting_engine(settings: Mapping[str, object]) -> Iterator[Callable[[], float]]:
    """Around a call of `vllm.LLM`: announces it, yields a clock (seconds since), reports a failure in one line."""
    started = time.perf_counter()
    print(f"\nstarting vLLM (tensor parallel {settings['tensor_parallel_size']}) ...", file=sys.stderr, flush=True)
    try:
        yield lambda: time.perf_counter() - started
    except Exception as error:
        raise CannotRun(f"vLLM did not start: {first_line(error)} (VLLM_LOGGING_LEVEL=INFO shows its log)") from None


def start_engine(settings: Mapping[str, object]) -> tuple["LLM", float]:
    """A vLLM engine and the seconds it took to start."""
    with starting_engine(settings) as clock:
        import vllm

        llm = vllm.LLM(**settings, use_tqdm_on_load=False)
    return llm, clock()


def stop_engine(llm: "LLM") -> None:
    """Give the engine's memory back, so that another one can start."""
    llm.llm_engine.engine_core.shutdown()
    gc.collect()
