"""vLLM's settings for this machine: the same script runs on a laptop and on eight GPUs.

Call `prepare_environment` before anything imports vllm (it reads its environment at import).
"""

import gc
import os
import sys
import time
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

    Args:
        machine: where the engine will run.
        ranks: tensor-parallel ranks, as far as they are known before the model is.

    Raises:
        CannotRun: a CPU was asked for, and the installed vLLM is the one for GPUs.
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
    """Whether weights are quantized to FP8: "auto" means where the GPU computes FP8.

    Raises:
        CannotRun: "fp8" was asked for on a machine without FP8 units.
    """
    if quantization == "fp8" and not machine.native_fp8:
        raise CannotRun(f"{machine.name} has no FP8 units (Ada, Hopper and newer GPUs do); use --quantization none")
    return quantization == "fp8" or (quantization == "auto" and machine.native_fp8)


def engine_args(
    model: Model,
    machine: Machine,
    *,
    quantization: str = "auto",
    tensor_parallel: int | None = None,
    max_model_len: int = 4096,
    max_num_seqs: int | None = None,
) -> dict[str, object]:
    """Arguments for `vllm.LLM` (or, as flags, for vLLM's server): the chapter's settings on this machine.

    Args:
        quantization: "auto" (FP8 where the GPU computes it), "fp8" or "none". FP8 weights bring an FP8 KV cache.
        tensor_parallel: GPUs (or CPU ranks) one copy of the model is sharded over; default: as many as it divides into.
        max_model_len: longest prompt plus answer in tokens, cut to what the model can.
        max_num_seqs: sequences decoded together; default: vLLM's choice on a GPU, 32 on a CPU.

    Raises:
        CannotRun: FP8 without FP8 units, more ranks than GPUs or than the model divides into, or weights larger than
            the memory.
    """
    # A checkpoint that is quantized already (AWQ, GPTQ, FP8, ...) says so itself, and is left as it is.
    fp8 = "quantization_config" not in model.config and use_fp8(machine, quantization)
    on_gpu = machine.device == "cuda"
    ranks = tensor_parallel or (tensor_parallel_size(model.config, machine.count) if on_gpu else 1)
    if on_gpu and ranks > machine.count:
        raise CannotRun(f"tensor parallelism over {ranks} GPUs, but this machine has {machine.count}")
    if why := why_not_sharded(model.config, ranks):
        raise CannotRun(f"{model.name} cannot be sharded: {why}")
    _check_memory(model, machine, ranks, bytes_per_weight=1 if fp8 else machine.itemsize)

    args: dict[str, object] = {
        "model": model.path,
        "tensor_parallel_size": ranks,
        "max_model_len": min(max_model_len, model.max_context),
        "enable_prefix_caching": True,
        # CUDA graphs on GPUs; a CPU has no launches to save, and compiling would only delay the start.
        "enforce_eager": not on_gpu,
    }
    if on_gpu:
        args["gpu_memory_utilization"] = GPU_MEMORY_UTILIZATION
    else:  # VLLM_CPU_KVCACHE_SPACE, where a user has set it, goes before
        args["kv_cache_memory_bytes"] = _cpu_cache_bytes(model, machine, args["max_model_len"])
        if ranks == 1 and os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
            args["distributed_executor_backend"] = "uni"
    if not machine.native_bf16:  # else as the checkpoint says
        args["dtype"] = machine.dtype
    if fp8:
        args |= {"quantization": "fp8", "kv_cache_dtype": "fp8"}
    if max_num_seqs or not on_gpu:
        args["max_num_seqs"] = max_num_seqs or 32
    if model.dummy:
        args |= {"load_format": "dummy", "skip_tokenizer_init": True}
    return args


def _cpu_cache_bytes(model: Model, machine: Machine, longest: int) -> int:
    """KV cache of a rank; more than the default where a sequence of `longest` tokens would not have room in that."""
    try:
        each = kv_bytes_per_token(model.config, machine.itemsize)
    except KeyError:  # a config of another family
        return CPU_KV_CACHE_BYTES
    spare = 2 * 128  # a block of vLLM-CPU that is not filled, and one that it keeps for itself
    return max(CPU_KV_CACHE_BYTES, (longest + spare) * each)


def _check_memory(model: Model, machine: Machine, ranks: int, bytes_per_weight: int) -> None:
    parameters = parameter_count(model.config)
    if parameters is None or "quantization_config" in model.config:
        return
    if machine.device == "cpu":
        ranks = 1  # they share the RAM
    weights = parameters * bytes_per_weight / ranks
    room = machine.memory_bytes * GPU_MEMORY_UTILIZATION
    if weights > room:
        each = f" on each of {ranks} GPUs" if ranks > 1 else ""
        device = "this machine" if machine.device == "cpu" else "a GPU"
        more = "" if machine.device == "cpu" else " or more GPUs"
        raise CannotRun(
            f"{model.name} does not fit: {weights / 2**30:.0f} GiB of weights{each}, "
            f"{device} has {room / 2**30:.0f} GiB to use; take a smaller --model{more}"
        )


def as_flags(args: dict[str, object]) -> list[str]:
    """`engine_args` in the spelling of vLLM's command line."""
    flags = []
    for name, value in args.items():
        flag = "--" + name.replace("_", "-")
        if value is False:
            flags.append(flag.replace("--", "--no-", 1))
        elif value is True:
            flags.append(flag)
        else:
            flags += [flag, str(value)]
    return flags


def start_engine(settings: dict[str, object]) -> tuple["LLM", float]:
    """A vLLM engine and the seconds it took to start."""
    started = time.perf_counter()
    print(f"\nstarting vLLM (tensor parallel {settings['tensor_parallel_size']}) ...", file=sys.stderr, flush=True)
    try:
        import vllm

        llm = vllm.LLM(**settings, use_tqdm_on_load=False)
    except Exception as error:
        raise CannotRun(f"vLLM did not start: {first_line(error)} (VLLM_LOGGING_LEVEL=INFO shows its log)") from None
    return llm, time.perf_counter() - started


def stop_engine(llm: "LLM") -> None:
    """Give the engine's memory back, so that another one can start."""
    llm.llm_engine.engine_core.shutdown()
    gc.collect()
