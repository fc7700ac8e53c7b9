"""Production serving with vLLM: one script that generates, measures, and serves.

vLLM keeps the KV cache in blocks (PagedAttention), admits requests as slots free up (continuous batching),
reuses the blocks of common prompts (prefix caching) and shards the model over all GPUs (tensor parallelism).

The demo completes the chapter's three prompts. Then it sends waves of random prompts at growing concurrency and
reports the best wave that meets the latency targets. One GPU is enough to run it, eight show the chapter's
claims; a CPU runs the same engine on a small real model.

    python3 ch16/inference_serving.py                                        # the demo
    python3 ch16/inference_serving.py --dummy-weights deepseek-coder-33b     # speed of the 33B shape, no download
    python3 ch16/inference_serving.py --serve --port 8000                    # the production server

How to read the table: TTFT is the time to first token, TPOT the time per output token after the first. More
concurrency raises throughput, and TPOT with it. `<- best` has the highest throughput of the waves that keep both
targets for TPOT: P50 under 50 ms and P99 under 100 ms. The claims are about a 33B model; a mixture of experts counts
by the parameters that a token uses.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from ch16.parts.inference_serving import flags
from ch16.parts.inference_serving.bodies import TEMPERATURE, TOP_P
from ch16.parts.inference_serving.flags import ServingSizes, sizes_for
from ch16.parts.inference_serving.picture import plot
from ch16.parts.inference_serving.process import serve_engine
from ch16.parts.inference_serving.tables import LOAD_COLUMNS, claims, differences
from common import cli, models, targets
from common.engine import exceptions, prepare_environment, quiet, starting_engine, stop_engine
from common.gpu import DTYPE_NAMES, Machine, UtilizationSampler, detect
from common.load import random_prompts, send_wave, summarise
from common.models import Model
from common.results import Report, wrapped

if TYPE_CHECKING:  # importing vLLM takes seconds, and reads the environment that prepare_environment sets
    from vllm import LLM, RequestOutput

# ---- configuration ----

# The chapter's arguments of LLM(...), for eight GPUs and a 33B model. vLLM starts its own ranks: the chapter's
# initialize_model_parallel(8) is not needed.
CHAPTER = {
    "tensor_parallel_size": 8,  # shard across 8 GPUs
    "dtype": "auto",  # the checkpoint's BF16; in the chapter's "float16" large activations overflow
    "max_model_len": 4096,
    "enforce_eager": False,  # use CUDA graphs
    "enable_prefix_caching": True,  # cache common prompts
    "gpu_memory_utilization": 0.90,  # use 90% of GPU memory
    "quantization": "fp8",  # FP8 for 2x throughput
    "kv_cache_dtype": "fp8",  # not in the chapter: twice as many tokens fit into the KV cache
}
PROMPTS = ["def quicksort(arr):", "# Binary search implementation\ndef binary_search", "class TreeNode:"]

# ---- mechanism ----


def settings_for(model: Model, machine: Machine, args: argparse.Namespace, quantization: str) -> dict[str, object]:
    """The chapter's settings with this machine's exceptions: without a GPU no CUDA graphs, without FP8 units no FP8."""
    settings = {"model": model.path} | CHAPTER
    asked = {"tensor_parallel": args.tensor_parallel, "max_num_seqs": args.max_num_seqs, "quantization": quantization}
    settings |= exceptions(settings, model, machine, **asked)
    return {name: value for name, value in settings.items() if value is not None}  # None: vLLM's default


def start(settings: dict[str, object]) -> tuple["LLM", float]:
    """The engine, and the seconds it took to start."""
    with starting_engine(settings) as clock:
        from vllm import LLM

        llm = LLM(**settings, use_tqdm_on_load=False)
    return llm, clock()


def token_count(outputs: Sequence["RequestOutput"]) -> int:
    """All tokens of these outputs."""
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def complete(llm: "LLM", max_tokens: int, seed: int) -> None:
    """Print each of the chapter's prompts with its completion."""
    from vllm import SamplingParams

    sampling_params = SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, max_tokens=max_tokens, seed=seed)
    started = time.perf_counter()
    outputs = llm.generate(PROMPTS, sampling_params, use_tqdm=sys.stderr.isatty())
    seconds = time.perf_counter() - started
    for output in outputs:
        print(f"\nPrompt: {output.prompt}\nGenerated: {output.outputs[0].text}")
    print(f"\n{len(PROMPTS)} completions, {token_count(outputs)} tokens in {seconds:.1f} s", flush=True)


def meets_targets(row: dict[str, float]) -> bool:
    """Whether a wave keeps S2 and S3."""
    return row["tpot_p50_ms"] < targets.TPOT_P50_MS and row["tpot_p99_ms"] < targets.TPOT_P99_MS


def search_concurrency(wave: Callable[[int], dict], first: int, limit: int, bisections: int = 2) -> list[dict]:
    """Double the concurrency until the targets break or the limit is reached, then bisect the last gap.

    `wave` measures one concurrency. Beyond `limit` requests would only queue: KV cache or batch slots are full.
    Returns all measured rows, by concurrency.
    """
    rows, good, bad = [], 0, None
    level = min(first, limit)
    while bad is None and good < limit:
        rows.append(wave(level))
        if meets_targets(rows[-1]):
            good, level = level, min(2 * level, limit)
        else:
            bad = level
    for _ in range(bisections):
        if bad is None or bad - good < 2 or bad - good < 0.1 * bad:
            break
        level = (good + bad) // 2
        rows.append(wave(level))
        if meets_targets(rows[-1]):
            good = level
        else:
            bad = level
    return sorted(rows, key=lambda row: row["concurrency"])


# ---- measurement ----


def capacity(llm: "LLM", tokens: int) -> int:
    """How many sequences of `tokens` tokens run at once: KV blocks and batch slots, whichever ends first."""
    config = llm.llm_engine.vllm_config
    blocks = math.ceil(tokens / config.cache_config.block_size)
    return max(1, min(config.scheduler_config.max_num_seqs, config.cache_config.num_gpu_blocks // blocks))


def precision_name(llm: "LLM") -> str:
    """What the weights are computed in, as the engine says."""
    config = llm.llm_engine.vllm_config.model_config
    dtype = str(config.dtype).removeprefix("torch.")
    return config.quantization.upper() if config.quantization else DTYPE_NAMES[dtype]


def measure_waves(llm: "LLM", model: Model, machine: Machine, sizes: ServingSizes, seed: int) -> list[dict]:
    """Waves of random prompts at growing concurrency. Keys: those of `summarise`, `utilization` and `best`."""
    ranks = llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size

    def wave(concurrency: int) -> dict[str, float]:
        prompts = random_prompts(concurrency, sizes.tokens_in, model.vocab_size, seed + concurrency)
        total = concurrency * sizes.tokens_out
        progress = tqdm(total=total, unit="tok", desc=f"{concurrency} at once", leave=False, disable=None)
        with progress, UtilizationSampler(machine, ranks) as gpu:
            sent, arrived = send_wave(llm, prompts, sizes.tokens_out, lambda new: progress.update(token_count(new)))
        return summarise(sent, arrived, ranks) | {"utilization": gpu.mean}

    send_wave(llm, random_prompts(sizes.first_wave, sizes.tokens_in, model.vocab_size, seed), 8)  # warm up
    rows = search_concurrency(wave, sizes.first_wave, capacity(llm, sizes.tokens_in + sizes.tokens_out))
    return targets.marked(rows, meets_targets, "<- misses the targets")


def measure(
    results: Report, engines: Sequence[dict], model: Model, machine: Machine, sizes: ServingSizes
) -> tuple[list[dict], list[dict]]:
    """One engine after the other: completions once, then waves. Returns all rows, and the best row of each engine."""
    rows, bests, seed = [], [], results.settings["seed"]
    for settings in engines:
        llm, seconds = start(settings)
        name = precision_name(llm)
        print(f"engine ready in {seconds:.0f} s ({name})", flush=True)
        if not model.dummy and not rows:
            complete(llm, sizes.completion, seed)
        waves = measure_waves(llm, model, machine, sizes, seed)
        waves = [row | {"precision": name, "engine_start_s": seconds} for row in waves]
        rows += waves
        bests.append(targets.best_row(waves, meets_targets))
        stop_engine(llm)
    title = f"Waves of random prompts, {sizes.tokens_in} tokens in and {sizes.tokens_out} out, {model.name}"
    results.table("load", title, rows, LOAD_COLUMNS)
    return rows, bests


# ---- main ----


def report(results: Report, args: argparse.Namespace, rows: list[dict], bests: list[dict], model: Model) -> None:
    """Print FP8 against BF16 and the claims; write JSON and picture."""
    if len(bests) == 2:
        ratio = bests[1]["tokens_per_s"] / bests[0]["tokens_per_s"]
        print(f"\nFP8 over BF16, each at its best concurrency: {ratio:.2f}x output tok/s")
    results.claims(claims(bests[-1], model, results.machine, results.settings["tensor_parallel"]))
    results.save(args.json)
    if args.plot:
        plot(args.plot, rows, bests[-1], model.name, results.machine)


def demo(args: argparse.Namespace, model: Model, machine: Machine) -> int:
    """Complete the chapter's prompts, measure, print the claims."""
    sizes = sizes_for(machine, args.quick)
    engines = [settings_for(model, machine, args, name) for name in flags.precisions(args, model, machine)]

    recorded = {"model": model.name, "dummy_weights": model.dummy, **vars(sizes), "seed": args.seed}
    recorded["tensor_parallel"] = engines[0]["tensor_parallel_size"]
    results = Report("inference_serving.py", machine, recorded, wide=args.wide)
    results.print_card()
    print(f"model:   {model.name}{' (random weights: speed only)' if model.dummy else ''}")
    if model.note:
        print(wrapped(f"         {model.note}", " " * 9))
    print(differences(engines[-1], CHAPTER))
    rows, bests = measure(results, engines, model, machine, sizes)
    report(results, args, rows, bests, model)
    return 0


def main() -> int:
    """The demo; or vLLM's OpenAI-compatible server with the same settings, in our layer."""
    args, vllm_flags = flags.parse(__doc__)
    machine = detect(args.device)
    if not args.serve:
        quiet()
    prepare_environment(machine, args.tensor_parallel or 1)
    model = models.chosen(args, machine)
    if args.serve:
        return serve_engine(settings_for(model, machine, args, args.quantization), model.name, args, vllm_flags)
    return demo(args, model, machine)


if __name__ == "__main__":
    cli.run(main)
