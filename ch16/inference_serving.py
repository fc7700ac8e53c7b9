"""Production serving with vLLM: one script that generates, measures, and serves.

vLLM keeps the KV cache in blocks (PagedAttention), admits requests as slots free up (continuous batching),
reuses blocks of common prompts (prefix caching) and shards the model over all GPUs (tensor parallelism). It sets
up its own ranks: nothing has to be initialised by hand.

The demo completes the chapter's three prompts, then sends waves of random prompts at growing concurrency and
reports the best one that meets the latency targets. One GPU is enough to run it, eight show the chapter's
claims; a CPU runs the same engine on a small real model.

    python3 ch16/inference_serving.py                                        # the demo
    python3 ch16/inference_serving.py --dummy-weights deepseek-coder-33b     # speed of the 33B shape, no download
    python3 ch16/inference_serving.py --serve --port 8000                    # the production server

How to read the table: output tok/s is what you can sell, TTFT what a user waits for the first token, TPOT
(time per output token after the first) how fast the text flows. More concurrency buys throughput with TPOT:
`<- best` has the highest throughput of the rows that keep both targets for TPOT, P50 under 50 ms and P99 under
100 ms. The claims are about a 33B model; of a mixture of experts the parameters that a token uses count.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

from ch16.parts.inference_serving.bodies import MAX_TOKENS, TEMPERATURE, TOP_P
from common import cli, models, targets
from common.cli import CannotRun
from common.engine import as_flags, engine_args, prepare_environment, quiet, start_engine, stop_engine
from common.gpu import DTYPE_NAMES, Machine, UtilizationSampler, detect
from common.load import random_prompts, send_wave, summarise
from common.models import Model
from common.plots import draw, save_plot
from common.results import Column, Report, Verdict, judge, not_applicable
from common.server import listen

if TYPE_CHECKING:  # importing vLLM takes seconds, and reads the environment that prepare_environment sets
    from vllm import LLM

# ---- configuration: the chapter's prompts; its targets are in common/targets.py ----

PROMPTS = (
    "def quicksort(arr):",
    "# Binary search implementation\ndef binary_search",
    "class TreeNode:",
)


@dataclass(frozen=True)
class Sizes:
    """How much the demo does: tokens of a completion, tokens in and out of a load request, first concurrency."""

    completion: int
    tokens_in: int
    tokens_out: int
    first_wave: int


def sizes_for(machine: Machine, quick: bool) -> Sizes:
    """Sizes that fill a GPU, or end in time on two CPU cores."""
    if machine.device == "cuda":
        return Sizes(MAX_TOKENS, 256, 128, 64) if quick else Sizes(MAX_TOKENS, 512, 512, 64)
    return Sizes(48, 32, 32, 8) if quick else Sizes(MAX_TOKENS, 64, 64, 4)


# ---- mechanism: the engine, the completions, one wave of load, the search for the best one ----


def complete(llm: "LLM", max_tokens: int, seed: int) -> None:
    """Print each of the chapter's prompts with its completion."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, max_tokens=max_tokens, seed=seed)
    started = time.perf_counter()
    outputs = llm.generate(list(PROMPTS), sampling, use_tqdm=sys.stderr.isatty())
    seconds = time.perf_counter() - started
    for output in outputs:
        print(f"\nPrompt: {output.prompt}\nGenerated: {output.outputs[0].text}")
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(f"\n{len(PROMPTS)} completions, {tokens} tokens in {seconds:.1f} s", flush=True)


def meets_targets(row: dict[str, float]) -> bool:
    """Whether a wave keeps S2 and S3."""
    return row["tpot_p50_ms"] < targets.TPOT_P50_MS and row["tpot_p99_ms"] < targets.TPOT_P99_MS


def search_concurrency(
    wave: Callable[[int], dict[str, float]], first: int, limit: int, bisections: int = 2
) -> list[dict[str, float]]:
    """Double the concurrency until the targets break or the limit is reached, then bisect the last gap.

    Args:
        wave: measures one concurrency.
        first: where to begin.
        limit: beyond it requests would only queue (KV cache or batch slots are full).
        bisections: waves spent between the last good and the first bad concurrency.

    Returns:
        All measured rows, by concurrency.
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


def best_row(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The highest throughput among the waves that meet the targets; if none does, the lowest TPOT P99."""
    good = [row for row in rows if meets_targets(row)]
    if good:
        return max(good, key=lambda row: row["tokens_per_s"])
    return min(rows, key=lambda row: row["tpot_p99_ms"])


# ---- measurement: the load phase and its claims ----

LOAD_COLUMNS = (
    Column("precision", "precision"),
    Column("concurrency", "concurrency", "d"),
    Column("tokens_per_s", "output tok/s", ",.0f"),
    Column("ttft_p50_ms", "TTFT P50 ms", ",.0f"),
    Column("ttft_p99_ms", "TTFT P99 ms", ",.0f"),
    Column("tpot_p50_ms", "TPOT P50 ms", ".1f"),
    Column("tpot_p99_ms", "TPOT P99 ms", ".1f"),
    Column("itl_p99_ms", "ITL P99 ms", ".1f"),
    Column("e2e_p50_ms", "E2E P50 ms", ",.0f"),
    Column("e2e_p99_ms", "E2E P99 ms", ",.0f"),
    Column("utilization", "GPU busy %", ".0f"),
    Column("best", ""),
)


def capacity(llm: "LLM", tokens: int) -> int:
    """How many sequences of `tokens` tokens run at once: KV blocks and batch slots, whichever ends first."""
    config = llm.llm_engine.vllm_config
    blocks = config.cache_config.num_gpu_blocks
    each = math.ceil(tokens / config.cache_config.block_size)
    return max(1, min(config.scheduler_config.max_num_seqs, blocks // each))


def precision_name(llm: "LLM") -> str:
    """What the weights are computed in, as the engine says."""
    config = llm.llm_engine.vllm_config.model_config
    dtype = str(config.dtype).removeprefix("torch.")
    return config.quantization.upper() if config.quantization else DTYPE_NAMES[dtype]


def measure_load(llm: "LLM", model: Model, machine: Machine, sizes: Sizes, seed: int) -> list[dict]:
    """Waves of random prompts at growing concurrency; rows as in LOAD_COLUMNS."""

    def wave(concurrency: int) -> dict[str, float]:
        prompts = random_prompts(concurrency, sizes.tokens_in, model.vocab_size, seed + concurrency)
        total = concurrency * sizes.tokens_out
        progress = tqdm(total=total, unit="tok", desc=f"{concurrency} at once", leave=False, disable=None)
        with progress, UtilizationSampler(machine, ranks) as gpu:
            sent, arrived = send_wave(
                llm,
                prompts,
                sizes.tokens_out,
                lambda outputs: progress.update(sum(len(output.outputs[0].token_ids) for output in outputs)),
            )
        return summarise(sent, arrived, ranks) | {"utilization": gpu.mean}

    ranks = llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size
    first = sizes.first_wave
    send_wave(llm, random_prompts(first, sizes.tokens_in, model.vocab_size, seed), 8)  # warm up
    rows = search_concurrency(wave, first, capacity(llm, sizes.tokens_in + sizes.tokens_out))
    best = best_row(rows)
    marks = {best["concurrency"]: "<- best" if meets_targets(best) else "<- misses the targets"}
    return [row | {"best": marks.get(row["concurrency"], "")} for row in rows]


def claims(best: dict[str, float], model: Model, machine: Machine, gpus: int) -> list[Verdict]:
    """S1 to S4 from the best wave on `gpus` of the machine's GPUs."""
    throughput, per_gpu = best["tokens_per_s"], best["tokens_per_s_gpu"]
    s1 = f"{throughput:,.0f} tok/s"
    if machine.device == "cpu":
        reason = f"the claim is about GPUs and a 33B model; this is a CPU and {model.name}"
        s2, s3, _ = targets.judged(best)
        latencies = [not_applicable(v.claim, reason, v.measured) for v in (s2, s3)]
        return [not_applicable("S1", reason, s1), *latencies, not_applicable("S4", "there is no GPU")]
    share = targets.TOKENS_PER_S / targets.GPUS
    s1 += f" on {gpus}; per GPU {per_gpu:,.0f}, an eighth of the claim is {share:,.0f}"
    verdicts = targets.judged(best)
    reason = targets.another_model(model)
    if reason:
        verdicts = [not_applicable(v.claim, reason, v.measured) for v in verdicts]
    elif gpus >= targets.GPUS:
        return [judge("S1", throughput >= targets.TOKENS_PER_S, s1), *verdicts]
    else:
        reason = f"the claim is about {targets.GPUS} GPUs, this was measured on {gpus}"
    return [not_applicable("S1", reason, s1), *verdicts]


def plot(path: str, rows: Sequence[dict], title: str) -> None:
    """Throughput and TPOT P99 over concurrency, one line a precision, with the target drawn in."""
    figure, (left, right) = draw(2)
    for precision in dict.fromkeys(row["precision"] for row in rows):
        line = [row for row in rows if row["precision"] == precision]
        x = [row["concurrency"] for row in line]
        (curve,) = left.plot(x, [row["tokens_per_s"] for row in line], "o-", label=precision)
        style = {"color": curve.get_color(), "marker": "o"}
        right.plot(x, [row["tpot_p50_ms"] for row in line], "--", label=f"{precision} P50", **style)
        right.plot(x, [row["tpot_p99_ms"] for row in line], "-", label=f"{precision} P99", **style)
    right.axhline(targets.TPOT_P50_MS, color="grey", linestyle=":", label="target P50")
    right.axhline(targets.TPOT_P99_MS, color="black", linestyle=":", label="target P99")
    left.set(title="output tokens/s", xlabel="requests at once", ylim=(0, None))
    right.set(title="time per output token, ms", xlabel="requests at once", ylim=(0, None))
    left.legend()
    right.legend()
    figure.suptitle(title)
    save_plot(figure, path)


def require_two_precisions(model: Model, machine: Machine) -> None:
    """Whether BF16 and FP8 can both be measured.

    Raises:
        CannotRun: the GPU does not compute FP8, or the checkpoint has a precision of its own.
    """
    if not machine.native_fp8:
        raise CannotRun(f"{machine.name} has no FP8 units (Ada, Hopper and newer GPUs do); leave --compare-bf16 out")
    if "quantization_config" in model.config:
        raise CannotRun(f"{model.name} is quantized already and runs as it is; --compare-bf16 needs a model in BF16")


def demo(args: argparse.Namespace) -> int:
    """Complete the chapter's prompts, measure, print the claims."""
    machine = detect(args.device)
    quiet()
    ranks = args.tensor_parallel or 1
    prepare_environment(machine, ranks)
    model = models.chosen(args, machine)
    sizes = sizes_for(machine, args.quick)
    precisions = [args.quantization]
    if args.compare_bf16:
        require_two_precisions(model, machine)
        precisions = ["none", "fp8"]
    settings = [
        engine_args(
            model,
            machine,
            quantization=precision,
            tensor_parallel=args.tensor_parallel,
            max_num_seqs=args.max_num_seqs,
        )
        for precision in precisions
    ]

    shown = {"model": model.name, "dummy_weights": model.dummy, **vars(sizes), "seed": args.seed}
    shown["tensor_parallel"] = settings[0]["tensor_parallel_size"]
    report = Report("inference_serving.py", machine, shown)
    report.print_card()
    print(f"model:   {model.name}{' (random weights: speed only)' if model.dummy else ''}")
    if model.note:
        print(f"         {model.note}")

    rows, bests = [], []
    for setting in settings:
        llm, seconds = start_engine(setting)
        name = precision_name(llm)
        print(f"engine ready in {seconds:.0f} s ({name})", flush=True)
        if not model.dummy and not rows:
            complete(llm, sizes.completion, args.seed)
        measured = measure_load(llm, model, machine, sizes, args.seed)
        rows += [row | {"precision": name, "engine_start_s": seconds} for row in measured]
        bests.append(best_row(measured))
        stop_engine(llm)

    title = f"Waves of random prompts, {sizes.tokens_in} tokens in and {sizes.tokens_out} out, {model.name}"
    report.table("load", title, rows, LOAD_COLUMNS)
    if args.compare_bf16:
        bf16, fp8 = bests
        ratio = fp8["tokens_per_s"] / bf16["tokens_per_s"]
        print(f"\nFP8 over BF16, each at its best concurrency: {ratio:.2f}x output tok/s")
    report.claims(claims(bests[-1], model, machine, shown["tensor_parallel"]))
    report.save(args.json)
    if args.plot:
        plot(args.plot, rows, f"{model.name} on {shown['tensor_parallel']} x {machine.name}")
    return 0


# ---- the server ----


def serve(args: argparse.Namespace, vllm_flags: Sequence[str]) -> int:
    """vLLM's OpenAI-compatible server with the chapter's settings, in our layer (`ch16/parts/inference_serving`)."""
    machine = detect(args.device)
    prepare_environment(machine, args.tensor_parallel or 1)
    model = models.chosen(args, machine)
    settings = engine_args(
        model,
        machine,
        quantization=args.quantization,
        tensor_parallel=args.tensor_parallel,
        max_num_seqs=args.max_num_seqs,
    )

    # The port is taken, and answers "loading", before the minutes of loading begin.
    from ch16.parts.inference_serving.layer import ServerSettings
    from ch16.parts.inference_serving.process import LoadingResponder, run_until_stopped

    listener = listen(args.host, args.port)
    responder = LoadingResponder(listener)
    chapter = ServerSettings(
        max_queue=args.max_queue,
        max_body_bytes=args.max_body_bytes,
        max_prompt_chars=args.max_prompt_chars,
        drain_timeout_s=args.drain_timeout,
        on_ready=responder.stop,
    )
    flags = [
        *as_flags(settings),
        *("--host", args.host, "--port", str(args.port)),
        *("--served-model-name", model.name),
        *("--seed", str(args.seed)),
        *("--scheduling-policy", "priority"),  # without priorities in the requests the same as first come first served
        *("--middleware", "ch16.parts.inference_serving.layer.ServingLayer"),
        "--enable-request-id-headers",
        "--disable-uvicorn-access-log",
    ]
    return run_until_stopped([*flags, *vllm_flags], chapter, listener)


def main() -> int:
    """Parse the flags, then demo or serve."""
    parser = cli.standard_parser(
        __doc__, model_help="auto, bundled, a folder, or a hub id such as deepseek-ai/deepseek-coder-6.7b-instruct"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--demo", action="store_true", help="completions, load, claims (also without any flag)")
    mode.add_argument("--serve", action="store_true", help="the HTTP server; flags not listed here go to vLLM's")
    engine = parser.add_argument_group("engine")
    models.dummy_weights_flag(engine)
    engine.add_argument(
        "--quantization", choices=("auto", "fp8", "none"), default="auto", help="auto: FP8 where the GPU computes it"
    )
    engine.add_argument("--tensor-parallel", type=cli.positive_int, metavar="N", help="default: all GPUs")
    engine.add_argument("--max-num-seqs", type=cli.positive_int, metavar="N", help="sequences decoded together")
    engine.add_argument("--compare-bf16", action="store_true", help="demo: measure BF16 and FP8 in the same run")
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines")
    server.add_argument("--port", type=int, default=8000, help="answers from the first second on, also while loading")
    server.add_argument("--max-queue", type=cli.non_negative_int, default=256, help="sequences that may wait; then 429")
    server.add_argument("--max-body-bytes", type=cli.positive_int, default=4 << 20, help="larger bodies get 413")
    server.add_argument(
        "--max-prompt-chars", type=cli.non_negative_int, default=0, help="0: 32 for each token of the context"
    )
    server.add_argument(
        "--drain-timeout",
        type=cli.non_negative_float,
        default=30.0,
        metavar="S",
        help="after SIGTERM, for requests in flight",
    )
    args, unknown = parser.parse_known_args()
    if unknown and not args.serve:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.serve and (args.json or args.plot or args.compare_bf16 or args.quick):
        parser.error("--quick, --json, --plot and --compare-bf16 belong to the demo")
    if args.compare_bf16 and args.quantization != "auto":
        parser.error("--compare-bf16 measures both precisions; leave --quantization out")
    return serve(args, unknown) if args.serve else demo(args)


if __name__ == "__main__":
    cli.run(main)
