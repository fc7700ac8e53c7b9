"""Eight GPUs, one model: as one server of eight, as two of four, or as eight of one behind a gateway?

Tensor parallelism cuts every layer over its GPUs: each reads an N-th of the weights, so a token is faster, and the
memory that the weights leave is one large KV cache; but all GPUs wait for each other twice a layer. Replicas exchange
nothing, and hold the weights once each. Which is better depends on the model, the memory and the load, so this starts
each layout as it would run in production (replicas of `inference_serving.py --serve` on GPUs of their own, the gateway
of `load_balancer.py` in front) and sends all of them the same load with vLLM's own benchmark client.

Made for one host with several GPUs. Two CPU cores run the same processes on a small model with random weights: there it
shows that the launch works, not which layout is fast.

    python3 ch16/serving_layouts.py                               # every layout that the model allows
    python3 ch16/serving_layouts.py --quick --plot layouts.png    # stand-ins for the replicas (simulated)
    python3 ch16/serving_layouts.py --dry-run                     # processes and memory on 8 GPUs, nothing started
    python3 ch16/serving_layouts.py --dummy-weights deepseek-coder-33b --layouts 8x1 2x4 1x8 --gpu-hour-price 2.5

How to read it: all requests of a load come at once, so TTFT is that of a burst, P99 that of the last prompt. `goodput`
counts requests that met the objective for both TTFT and TPOT. `<- best` is a layout's highest throughput whose TPOT P99
meets the objective. `client late` is how late the client's own clock was: near TPOT the client is the bottleneck.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from ch16.parts.serving_layouts.launch import (
    Command,
    Service,
    cache_tokens,
    gateway_command,
    replica_commands,
    running,
    words_tokenizer,
)
from ch16.parts.serving_layouts.picture import plot_layouts, plot_plan
from ch16.parts.serving_layouts.plan import (
    WORKING_BYTES,
    Layout,
    gib,
    parse_layout,
    possible_layouts,
    problem,
    room_for,
)
from common import cli, models, targets
from common.cli import CannotRun
from common.engine import quiet, use_fp8
from common.gpu import Machine, UtilizationSampler, detect, device_names
from common.loadclient import Load, Objective, Target, run_load
from common.models import Model
from common.results import Column, Report, Verdict, judge, not_applicable
from common.standin import MODEL as STANDIN
from common.standin import standin_command

# ---- configuration ----

CHAPTER_SHAPE, CPU_SHAPE = "deepseek-coder-33b", "small-moe"  # on GPUs, and on a CPU
CPU_RANKS = 2
MAX_MODEL_LEN = 4096  # the server's default
SEQUENCE_TOKENS = 1024  # of a request in the dry run's table
FIRST_PORT, GATEWAY_PORT = 8001, 9000  # in the dry run's commands

LAYOUT_COLUMNS = (
    Column("layout", "layout"),
    Column("at_once", "requests at once", ",d"),
    Column("tokens_per_s", "output tok/s", ",.0f"),
    Column("tokens_per_s_device", "a device", ",.0f"),
    Column("tpot_p50_ms", "TPOT P50 ms", ".1f"),
    Column("tpot_p99_ms", "TPOT P99 ms", ".1f"),
    Column("ttft_p50_ms", "TTFT P50 ms", ",.0f"),
    Column("ttft_p99_ms", "TTFT P99 ms", ",.0f"),
    Column("utilization", "GPU busy %", ".0f"),
    Column("goodput", "goodput req/s", ",.2f"),
    Column("good_percent", "good %", ".0f"),
    Column("price", "price of 1M output tokens", ".3f"),
    Column("errors", "errors", "d"),
    Column("late_ms", "client late P99 ms", ".1f"),
    Column("best", ""),
)
PLAN_COLUMNS = (
    Column("machine", "machine"),
    Column("layout", "layout"),
    Column("processes", "processes", "d"),
    Column("weights_gib", "weights GiB a device", ".1f"),
    Column("cache_gib", "KV cache GiB a device", ".1f"),
    Column("cache_tokens", "KV tokens, all replicas", ",d"),
    Column("sequences", f"sequences of {SEQUENCE_TOKENS:,} tokens", ",d"),
    Column("problem", "does not fit"),
)
START_COLUMNS = (
    Column("layout", "layout"),
    Column("start_s", "ready after s", ".0f"),
    Column("cache_tokens", "KV tokens planned", ",d"),
    Column("measured_cache_tokens", "KV tokens of vLLM", ",d"),
    Column("error_percent", "error %", "+.1f"),
)


@dataclass(frozen=True)
class Sizes:
    """Tokens in and out of a request, and for each load how many requests come at once for each device."""

    tokens_in: int
    tokens_out: int
    at_once: tuple[int, ...]


def sizes_for(machine: Machine, quick: bool) -> Sizes:
    """The chapter's load on GPUs; one that ends in time on two CPU cores."""
    if quick:
        return Sizes(32, 32, (8, 16))
    return Sizes(512, 512, (64, 128, 192, 256)) if machine.device == "cuda" else Sizes(64, 64, (4, 16))


# ---- mechanism: a layout comes up, takes loads, goes down ----


def serving(layout: Layout, service: Service) -> list[Command]:
    """The replicas of a layout; stand-ins where there is no model."""
    if service.model is not None:
        return replica_commands(layout, service)
    words = standin_command("--step-ms", "3", "--sequence-us", "300", "--prefill-us", "10", "--slots", "16")
    return [Command(tuple(words[1:]), {})] * layout.replicas


def measure_layout(layout: Layout, service: Service, loads: Sequence[Load], objective: Objective) -> tuple[list, dict]:
    """Start a layout, send the loads one after the other, stop it.

    Returns:
        A row of LAYOUT_COLUMNS for each load, and how it started: seconds, and tokens of vLLM's KV caches.
    """
    model, rows = service.model, []
    name, tokenizer = (model.name, model.path) if model else (STANDIN, models.bundled().path)
    if model and model.dummy:
        tokenizer = words_tokenizer(model)
    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        running(serving(layout, service), Path(folder)) as (gateway, replicas),
    ):
        start = {"start_s": time.perf_counter() - began}
        if model:
            start["measured_cache_tokens"] = cache_tokens(replicas)
        print(f"{layout}: ready after {start['start_s']:.0f} s", file=sys.stderr, flush=True)
        target = Target(gateway.url, name, tokenizer)
        run_load(target, replace(loads[0], tokens_out=8), seed=service.seed)  # warm up
        for number, load in enumerate(tqdm(loads, desc=str(layout), leave=False, disable=None)):
            with UtilizationSampler(service.machine, layout.devices) as gpu:
                row = run_load(target, load, objective, service.seed + 1 + number)
            row |= {"layout": str(layout), "at_once": load.requests, "utilization": busy(gpu.samples)}
            rows.append(row | {"tokens_per_s_device": row["tokens_per_s"] / layout.devices})
    return rows, start


def busy(samples: Sequence[float]) -> float | None:
    """Mean utilization while there was work: without the idle samples before and after it, when the client prepares."""
    worked = [i for i, sample in enumerate(samples) if sample > 0]
    between = samples[worked[0] : worked[-1] + 1] if worked else []
    return sum(between) / len(between) if between else None


# ---- measurement: which layout is best, and the claims ----


def best_row(rows: Sequence[dict], objective: Objective) -> dict:
    """The highest throughput whose TPOT P99 meets the objective without an error; if none does, the lowest P99."""
    good = [row for row in rows if meets(row, objective)]
    return max(good, key=lambda row: row["tokens_per_s"]) if good else min(rows, key=lambda row: row["tpot_p99_ms"])


def meets(row: dict, objective: Objective) -> bool:
    """Whether a load was served as the objective asks, by P99 of TPOT."""
    return row["tpot_p99_ms"] <= objective.tpot_ms and not row["errors"]


def marked(rows: list[dict], objective: Objective) -> list[dict]:
    """The rows of one layout, its best one marked."""
    best = best_row(rows, objective)
    mark = "<- best" if meets(best, objective) else "<- misses the objective"
    return [row | {"best": mark if row is best else ""} for row in rows]


def claims(best: dict, layout: Layout, model: Model | None, machine: Machine) -> list[Verdict]:
    """S1 to S4 by the best row of all layouts; they are about eight GPUs and a 33B model."""
    throughput = best["tokens_per_s"]
    s1 = judge("S1", throughput >= targets.TOKENS_PER_S, f"{throughput:,.0f} tok/s as {layout}")
    verdicts = [s1, *targets.judged(best)]
    reason = "the replicas were stand-ins" if model is None else targets.why_not_judged(model, machine)
    if not reason and layout.devices >= targets.GPUS:
        return verdicts
    reason = reason or f"the claim is about {targets.GPUS} GPUs, this was measured on {layout.devices}"
    return [not_applicable(v.claim, v.reason or reason, v.measured) for v in verdicts]


# ---- what is asked for ----


def chosen(args: argparse.Namespace, machine: Machine, shape: str) -> tuple[Model, bool]:
    """The model that was asked for, else random weights of a shape; and whether it runs in FP8."""
    model = models.chosen(args, machine) if args.model or args.dummy_weights else models.dummy(shape)
    return model, "quantization_config" not in model.config and use_fp8(machine, args.quantization)


def choose(args: argparse.Namespace, model: Model | None, fp8: bool, host: Machine) -> list[Layout]:
    """The layouts that were asked for, else all that use every device, and on a CPU one device alone.

    Those that cannot run are left out, by name.

    Raises:
        CannotRun: one that was asked for cannot, or none can.
    """
    alone = [] if host.device == "cuda" else [Layout(1, 1)]
    if model is None:
        wanted = args.layouts or [*alone, Layout(host.count, 1)]
        problems = {layout: "a stand-in has no ranks" if layout.ranks > 1 else "" for layout in wanted}
    else:
        wanted = args.layouts or [*alone, *possible_layouts(model.config, host.count)]
        longest = min(MAX_MODEL_LEN, model.max_context)
        problems = {layout: problem(model.config, layout, host, fp8, longest) for layout in wanted}
    refused = [layout for layout, why in problems.items() if why]
    if refused and (len(refused) == len(problems) or (args.layouts and model)):
        raise CannotRun(f"{refused[0]} cannot run here: {problems[refused[0]]}")
    for layout in refused:
        print(f"left out: {layout}: {problems[layout]}")
    return [layout for layout, why in problems.items() if not why]


def loads_for(args: argparse.Namespace, machine: Machine) -> list[Load]:
    """The loads that were asked for, else the same for each of the machine's devices."""
    sizes = sizes_for(machine, args.quick)
    numbers = args.requests or [number * machine.count for number in sizes.at_once]
    return [Load(number, sizes.tokens_in, sizes.tokens_out) for number in numbers]


def machine_type(text: str) -> Machine:
    """argparse type: NxG, a host with N GPUs of G GiB, for the dry run."""
    count, memory = map(int, text.split("x"))
    if min(count, memory) < 1:
        raise ValueError(text)
    name = f"{count} x {memory} GB"
    return Machine("cuda", name, count, memory * 2**30, 0, None, native_bf16=True, native_fp8=True)


# ---- the dry run ----


def dry_run(args: argparse.Namespace) -> int:
    """Print what each layout would start and has room for."""
    here = detect(args.device)
    model, fp8 = chosen(args, args.machine[0], CHAPTER_SHAPE)
    longest, rows, commands = min(MAX_MODEL_LEN, model.max_context), [], {}
    for machine in args.machine:
        loads = loads_for(args, machine)
        devices = [str(number) for number in range(machine.count)]
        service = Service(model, machine, devices, max(load.requests for load in loads), args.quantization, args.seed)
        for layout in args.layouts or possible_layouts(model.config, machine.count):
            room = room_for(model.config, layout, machine, fp8)
            if room is None:
                raise CannotRun(f"how much memory {model.name} needs is known here only for plain Llama-like models")
            why = problem(model.config, layout, machine, fp8, longest)
            row = {"machine": machine.name, "layout": str(layout), "processes": layout.processes, "problem": why}
            row |= {"memory_gib": gib(machine.memory_bytes), "working_gib": gib(WORKING_BYTES)}
            row |= {"weights_gib": gib(room.weights), "cache_gib": gib(room.cache), "cache_tokens": room.tokens}
            rows.append(row | {"sequences": room.tokens // SEQUENCE_TOKENS})
            if not why:
                commands[layout] = replica_commands(layout, service)

    settings = {"model": model.name, "quantization": args.quantization, "dry_run": True}
    report = Report("serving_layouts.py", here, settings)
    precision = "FP8 weights and KV cache" if fp8 else "BF16"
    report.table("plan", f"Plan for {model.name}, {precision} (computed, nothing is started)", rows, PLAN_COLUMNS)
    refused = [row for row in rows if row["problem"]]
    if refused and (args.layouts or len(refused) == len(rows)):
        raise CannotRun(f"{refused[0]['layout']} does not fit on {refused[0]['machine']}: {refused[0]['problem']}")
    for layout, replicas in commands.items():
        print(f"\n{layout} (a run takes free ports)")
        for number, command in enumerate(replicas):
            print(f"  {shell(command, FIRST_PORT + number)}")
        addresses = [f"127.0.0.1:{FIRST_PORT + number}" for number in range(layout.replicas)]
        print(f"  {shell(gateway_command(addresses), GATEWAY_PORT)}")
    report.claims([not_applicable(claim, "a dry run measures nothing") for claim in ("S1", "S2", "S3", "S4")])
    report.save(args.json)
    if args.plot:
        plot_plan(args.plot, rows)
    return 0


def shell(command: Command, port: int) -> str:
    """A process as it would be typed in the repository's folder."""
    words = [word.replace(f"{models.ROOT}/", "") for word in command.words]
    return " ".join([*(f"{key}={value}" for key, value in command.env.items()), "python3", *words, "--port", str(port)])


# ---- the comparison ----


def compare(args: argparse.Namespace) -> int:
    """Measure all layouts, print the table and the claims."""
    machine = detect(args.device)
    quiet()
    host = machine if machine.device == "cuda" else replace(machine, count=CPU_RANKS)
    loads, objective = loads_for(args, host), Objective(args.slo_ttft_ms, args.slo_tpot_ms)
    if args.quick:
        model, fp8, what = None, False, "stand-ins (simulated)"
    else:
        model, fp8 = chosen(args, machine, CHAPTER_SHAPE if machine.device == "cuda" else CPU_SHAPE)
        what = model.name + (" (random weights)" if model.dummy else "")
    layouts = choose(args, model, fp8, host)

    at_once = max(load.requests for load in loads)
    service = Service(model, machine, device_names(machine), at_once, args.quantization, args.seed)
    settings = {"model": what, "tokens_in": loads[0].tokens_in, "tokens_out": loads[0].tokens_out, "seed": args.seed}
    settings |= {"quantization": args.quantization, **vars(objective)}
    report = Report("serving_layouts.py", machine, settings)
    report.print_card()
    rows, starts, bests = [], [], {}
    for layout in layouts:
        try:
            measured, start = measure_layout(layout, service, loads, objective)
        except CannotRun as error:  # what was measured before is not lost
            if layout is layouts[-1] and not rows:
                raise
            print(f"left out: {layout}: {error}", file=sys.stderr)
            continue
        if args.gpu_hour_price:
            for row in measured:
                row["price"] = price_of_a_million(row["tokens_per_s"], args.gpu_hour_price * layout.devices)
        rows += marked(measured, objective)
        bests[layout] = best_row(measured, objective)
        if model and (room := room_for(model.config, layout, machine, fp8)):
            found = start["measured_cache_tokens"]
            start |= {"cache_tokens": room.tokens, "error_percent": 100 * (room.tokens / found - 1) if found else None}
        starts.append({"layout": str(layout)} | start)

    if model:
        report.table("starts", f"KV cache of {what}, as planned and as vLLM found room", starts, START_COLUMNS)
    title = f"{what}, {loads[0].tokens_in} tokens in and {loads[0].tokens_out} out, all requests of a load at once"
    report.table("layouts", title, rows, [c for c in LAYOUT_COLUMNS if any(row.get(c.key) is not None for row in rows)])
    print(f"  objective: TTFT {objective.ttft_ms:,.0f} ms, TPOT {objective.tpot_ms:,.0f} ms")
    good = [layout for layout in bests if meets(bests[layout], objective)]
    winner = max(good or bests, key=lambda layout: bests[layout]["tokens_per_s"])
    report.claims(claims(bests[winner], winner, model, machine))
    report.save(args.json)
    if args.plot:
        plot_layouts(args.plot, rows, objective.tpot_ms)
    return 0


def price_of_a_million(tokens_per_s: float, price_per_hour: float) -> float:
    """What a million output tokens cost on a host that is this busy all the time."""
    return 1e6 * price_per_hour / (3600 * tokens_per_s)


def main() -> int:
    """Parse the flags; compare layouts, or say what they would be."""
    parser = cli.standard_parser(
        __doc__, model_help=f"default: random weights, of {CHAPTER_SHAPE} on GPUs, of {CPU_SHAPE} on a CPU"
    )
    parser.set_defaults(model=None)
    models.dummy_weights_flag(parser)
    parser.add_argument(
        "--quantization", choices=("auto", "fp8", "none"), default="auto", help="auto: FP8 where the GPU computes it"
    )
    parser.add_argument(
        "--layouts",
        type=parse_layout,
        nargs="+",
        metavar="RxT",
        help="R replicas over T devices each, as in 8x1 2x4 1x8; default: all that use every device",
    )
    parser.add_argument(
        "--requests", type=cli.positive_int, nargs="+", metavar="N", help="only these loads: N requests at once"
    )
    parser.add_argument("--slo-ttft-ms", type=cli.positive_float, default=10_000.0, metavar="MS", help="objective")
    parser.add_argument("--slo-tpot-ms", type=cli.positive_float, default=50.0, metavar="MS", help="objective")
    parser.add_argument("--gpu-hour-price", type=cli.positive_float, metavar="P", help="of one GPU, in any currency")
    parser.add_argument("--dry-run", action="store_true", help="print processes and memory, start nothing")
    parser.add_argument(
        "--machine",
        type=machine_type,
        nargs="+",
        metavar="NxG",
        help="of the dry run: N GPUs of G GB; default: 8x80 and 8x141 (H100, H200)",
    )
    args = parser.parse_args()
    if args.machine and not args.dry_run:
        parser.error("--machine belongs to --dry-run; a run takes the machine that it is on")
    args.machine = args.machine or [machine_type("8x80"), machine_type("8x141")]
    return dry_run(args) if args.dry_run else compare(args)


if __name__ == "__main__":
    cli.run(main)
