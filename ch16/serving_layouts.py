"""Eight GPUs, one model: one server on eight, two on four, or eight on one behind a gateway?

Tensor parallelism (TP) cuts every layer over its GPUs. Each GPU reads an N-th of the weights, so a token is faster, and
the memory that the weights leave is one large KV cache; but all GPUs wait for each other twice per layer. Replicas
exchange nothing, and each holds all weights. Which is better depends on the model, the memory and the load.

So this starts each layout as it would run in production: replicas of `inference_serving.py --serve` on GPUs of their
own, the gateway of `load_balancer.py` in front. All layouts get the same load from vLLM's own benchmark client.

Made for one host with several GPUs. Two CPU cores run the same processes on a small model with random weights: there it
shows that the launch works, not which layout is fast.

    python3 ch16/serving_layouts.py                               # every layout that the model allows
    python3 ch16/serving_layouts.py --quick --plot layouts.png    # stand-ins for the replicas (simulated)
    python3 ch16/serving_layouts.py --dry-run                     # processes and memory on 8 GPUs, nothing started
    python3 ch16/serving_layouts.py --dummy-weights deepseek-coder-33b --layouts 8x1 2x4 1x8 --gpu-hour-price 2.5

How to read it: all requests of a load come at once, so TTFT is that of a burst. `good %` are the requests that met the
objective for both TTFT and TPOT. `<- best` is a layout's highest throughput whose TPOT P99 meets the objective.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tqdm import tqdm

from ch16.parts.serving_layouts import launch
from ch16.parts.serving_layouts.flags import loads_for, model_for, parse
from ch16.parts.serving_layouts.launch import Command, Service, shell, words_tokenizer
from ch16.parts.serving_layouts.picture import plot_layouts, plot_plan
from ch16.parts.serving_layouts.tables import PLAN_COLUMNS, START_COLUMNS, claims, layout_columns, plan_row
from common import cli, models, targets
from common.cli import CannotRun
from common.engine import CPU_KV_CACHE_BYTES, GPU_MEMORY_UTILIZATION, quiet
from common.gpu import Machine, UtilizationSampler, detect, device_names
from common.loadclient import Endpoint, Objective, RequestLoad, run_load
from common.models import Model, kv_bytes_per_token, parameter_count, why_not_sharded
from common.results import Report, not_applicable
from common.standin import MODEL as STANDIN

# ---- configuration ----

CPU_RANKS = 2
MAX_MODEL_LEN = 4096  # the server's default
GIB = 2**30
# Activations, CUDA graphs, NCCL's buffers: about what was neither weights nor KV cache when vLLM ran the 33B shape on
# one H100 (results/h100/inference_serving.json: the KV cache held 303 sequences of 1,024 tokens).
WORKING_BYTES = 4 * GIB
STREAM_INTERVAL = 8  # tokens per event: one gateway and one client, each on one core, pass on the tokens of all GPUs
GRAPHS_UP_TO = 512  # sequences per batch, by vLLM's default; a larger batch would run without CUDA graphs

# ---- mechanism ----


@dataclass(frozen=True)
class Layout:
    """`replicas` of the model, each over `ranks` devices by tensor parallelism.

    N x TP=1: every device holds the whole model and exchanges nothing; the weights are stored N times.
    1 x TP=N: every device holds an N-th of each layer; the weights are stored once, and all wait for each other.
    """

    replicas: int
    ranks: int

    def __str__(self) -> str:
        return f"{self.replicas} x TP={self.ranks}"

    @property
    def devices(self) -> int:
        """On the whole host."""
        return self.replicas * self.ranks

    @property
    def processes(self) -> int:
        """The gateway; per replica an API server, an engine, and one worker per rank if there are several ranks."""
        return 1 + self.replicas * (2 + (self.ranks if self.ranks > 1 else 0))


def parse_layout(text: str) -> Layout:
    """argparse type: RxT, R replicas over T devices each."""
    replicas, ranks = map(int, text.split("x"))
    if min(replicas, ranks) < 1:
        raise ValueError(text)
    return Layout(replicas, ranks)


def possible_layouts(config: Mapping[str, object], devices: int) -> list[Layout]:
    """All layouts that use every device and whose ranks divide the model, from most replicas to fewest."""
    return [
        Layout(devices // ranks, ranks)
        for ranks in range(1, devices + 1)
        if devices % ranks == 0 and not why_not_sharded(config, ranks)
    ]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per device, and the tokens that the KV caches of all replicas hold together."""

    weights: float
    cache: float  # below 0: the weights alone are too large
    tokens: int


def plan_memory(config: Mapping[str, object], layout: Layout, machine: Machine, fp8: bool) -> MemoryPlan | None:
    """The memory of a layout, in FP8 or not; None if the number of parameters does not follow from the config here.

    weights = parameters x bytes / ranks; vLLM does not quantize the embedding and the head
    cache   = 0.9 of the device - working memory - weights
    tokens  = replicas x cache / (KV bytes per token / min(ranks, KV heads)): further ranks hold copies of KV heads
    """
    parameters, size = parameter_count(config), 1 if fp8 else machine.itemsize
    if parameters is None or "quantization_config" in config:
        return None
    embeddings = config["vocab_size"] * config["hidden_size"] * (1 if config.get("tie_word_embeddings") else 2)
    weights = ((parameters - embeddings) * size + machine.itemsize * embeddings) / layout.ranks
    if machine.device == "cpu":
        cache = CPU_KV_CACHE_BYTES  # whatever the weights leave
    else:
        cache = GPU_MEMORY_UTILIZATION * machine.memory_bytes - WORKING_BYTES - weights
    shares = min(layout.ranks, config.get("num_key_value_heads") or config["num_attention_heads"])
    tokens = layout.replicas * max(0, int(cache * shares // kv_bytes_per_token(config, size)))
    return MemoryPlan(weights, cache, tokens)


def problem(config: Mapping[str, object], layout: Layout, machine: Machine, fp8: bool, longest: int) -> str:
    """Why a layout cannot run here; empty if it can. A replica's KV cache must hold `longest` tokens."""
    if layout.devices > machine.count:
        return f"it needs {layout.devices} devices, there are {machine.count}"
    if why := why_not_sharded(config, layout.ranks):
        return why
    plan = plan_memory(config, layout, machine, fp8)
    if plan is None:
        return ""
    if plan.cache <= 0:
        usable = GPU_MEMORY_UTILIZATION * machine.memory_bytes
        return f"{plan.weights / GIB:.0f} GiB of weights on each device, of which {usable / GIB:.0f} GiB can be used"
    if plan.tokens < layout.replicas * longest:
        return f"a KV cache of {plan.tokens // layout.replicas:,} tokens, one sequence may have {longest:,}"
    return ""


def replica_commands(layout: Layout, service: Service) -> list[Command]:
    """The replicas, on disjoint devices. Each takes its share of the requests and decodes all of them together."""
    model, share = service.model, math.ceil(service.at_once / layout.replicas)
    words = [str(launch.SERVING), "--serve", "--device", service.machine.device, "--seed", str(service.seed)]
    words += ["--dummy-weights" if model.dummy else "--model", model.absolute_path]
    words += ["--tensor-parallel", str(layout.ranks), "--quantization", service.quantization]
    words += ["--max-num-seqs", str(share), "--max-queue", str(service.at_once)]
    # The client's random prompts count upwards from random tokens: a shared prefix would be chance.
    words += ["--no-enable-prefix-caching", "--stream-interval", str(STREAM_INTERVAL)]
    if model.dummy:
        words += ["--tokenizer", words_tokenizer(model), "--no-skip-tokenizer-init"]
    if service.machine.device == "cpu":  # a device is a core
        env = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": str(CPU_KV_CACHE_BYTES // GIB)}  # as planned
        return [Command(tuple(words), env)] * layout.replicas
    if share > GRAPHS_UP_TO:
        words += ["--max-cudagraph-capture-size", str(share)]
    groups = [service.devices[i * layout.ranks : (i + 1) * layout.ranks] for i in range(layout.replicas)]
    return [Command(tuple(words), {"CUDA_VISIBLE_DEVICES": ",".join(group)}) for group in groups]


# ---- measurement ----


def measure_layout(
    layout: Layout, service: Service, loads: Sequence[RequestLoad], objective: Objective
) -> tuple[list[dict], dict]:
    """Start a layout, send the loads one after the other, stop it.

    Returns a row per load, with the keys of `run_load`, and how the layout started: seconds, tokens of its KV caches.
    """
    model, rows = service.model, []
    name, tokenizer = (model.name, model.path) if model else (STANDIN, models.bundled().path)
    if model and model.dummy:
        tokenizer = words_tokenizer(model)
    commands = replica_commands(layout, service) if model else launch.standin_commands(layout.replicas)
    print(f"{layout}: starting ...", file=sys.stderr, flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, launch.running(commands, Path(folder)) as (gateway, replicas):
        start = {"start_s": time.perf_counter() - began}
        if model:
            start["measured_cache_tokens"] = launch.cache_tokens(replicas)
        print(f"{layout}: ready after {start['start_s']:.0f} s", file=sys.stderr, flush=True)
        endpoint = Endpoint(gateway.url, name, tokenizer)
        run_load(endpoint, replace(loads[0], tokens_out=8), seed=service.seed)  # warm up
        for number, load in enumerate(tqdm(loads, desc=str(layout), leave=False, disable=None)):
            with UtilizationSampler(service.machine, layout.devices) as gpu:
                row = run_load(endpoint, load, objective, service.seed + 1 + number)
            row |= {"layout": str(layout), "at_once": load.requests, "utilization": busy(gpu.samples)}
            rows.append(row | {"tokens_per_s_device": row["tokens_per_s"] / layout.devices})
    return rows, start


def busy(samples: Sequence[float]) -> float | None:
    """Mean utilization while there was work: without the idle samples before and after, when the client prepares."""
    worked = [i for i, sample in enumerate(samples) if sample > 0]
    between = samples[worked[0] : worked[-1] + 1] if worked else []
    return sum(between) / len(between) if between else None


def meets(row: dict, objective: Objective) -> bool:
    """Whether a load was served as the objective asks, by P99 of TPOT, without an error."""
    return row["tpot_p99_ms"] <= objective.tpot_ms and not row["errors"]


def price_of_a_million(tokens_per_s: float, price_per_hour: float) -> float:
    """What a million output tokens cost on a host that is this busy all the time."""
    return 1e6 * price_per_hour / (3600 * tokens_per_s)


def measure(
    results: Report, args: argparse.Namespace, layouts: Sequence[Layout], service: Service, loads: Sequence[RequestLoad]
) -> tuple[list[dict], dict[Layout, dict]]:
    """One layout after the other. Returns all rows, and the best row of each layout. CannotRun: there is none."""
    objective, rows, starts, bests = Objective(args.slo_ttft_ms, args.slo_tpot_ms), [], [], {}
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
        good = partial(meets, objective=objective)
        measured = targets.marked(measured, good, "<- misses SLO")
        bests[layout] = targets.best_row(measured, good)
        rows += measured
        if service.model and (plan := plan_memory(service.model.config, layout, service.machine, service.fp8)):
            found = start["measured_cache_tokens"]
            start |= {"cache_tokens": plan.tokens, "error_percent": 100 * (plan.tokens / found - 1) if found else None}
        starts.append({"layout": str(layout)} | start)

    what = results.settings["model"]
    if service.model:
        results.table("starts", f"KV cache of {what}, as planned and as vLLM found it", starts, START_COLUMNS)
    title = f"{what}, {loads[0].tokens_in} tokens in and {loads[0].tokens_out} out, all requests of a load at once"
    results.table("layouts", title, rows, layout_columns(rows, service.machine))
    print(f"  objective: TTFT {objective.ttft_ms:,.0f} ms, TPOT {objective.tpot_ms:,.0f} ms")
    return rows, bests


def plan_all(args: argparse.Namespace, model: Model, fp8: bool) -> tuple[list[dict], dict[Layout, list[Command]]]:
    """Memory and processes of all layouts, computed. Keys of the rows: those of `plan_row`."""
    longest, rows, commands = min(MAX_MODEL_LEN, model.max_context), [], {}
    for machine in args.machine:
        at_once = max(load.requests for load in loads_for(args, machine))
        service = Service(model, machine, [str(i) for i in range(machine.count)], at_once, args.quantization, args.seed)
        for layout in args.layouts or possible_layouts(model.config, machine.count):
            plan = plan_memory(model.config, layout, machine, fp8)
            if plan is None:
                raise CannotRun(f"how much memory {model.name} needs is known here only for plain Llama-like models")
            why = problem(model.config, layout, machine, fp8, longest)
            rows.append(plan_row(machine, layout, plan, WORKING_BYTES, why))
            if not why:
                commands[layout] = replica_commands(layout, service)
    return rows, commands


# ---- main ----


def choose(args: argparse.Namespace, model: Model | None, fp8: bool, host: Machine) -> list[Layout]:
    """The layouts that were asked for, else all that use every device, and on a CPU one device alone.

    Those that cannot run are left out, by name. CannotRun: one that was asked for cannot, or none can.
    """
    possible = possible_layouts(model.config, host.count) if model else [Layout(host.count, 1)]
    wanted = args.layouts or [*([] if host.device == "cuda" else [Layout(1, 1)]), *possible]
    if model is None:
        problems = {layout: "a stand-in has no ranks" if layout.ranks > 1 else "" for layout in wanted}
    else:
        longest = min(MAX_MODEL_LEN, model.max_context)
        problems = {layout: problem(model.config, layout, host, fp8, longest) for layout in wanted}
    refused = [layout for layout, why in problems.items() if why]
    if refused and (len(refused) == len(problems) or (args.layouts and model)):
        raise CannotRun(f"{refused[0]} cannot run here: {problems[refused[0]]}")
    for layout in refused:
        print(f"left out: {layout}: {problems[layout]}")
    return [layout for layout, why in problems.items() if not why]


def dry_run(args: argparse.Namespace) -> None:
    """Print the memory of each layout, and its processes."""
    model, fp8 = model_for(args, args.machine[0])
    rows, commands = plan_all(args, model, fp8)
    settings = {"model": model.name, "quantization": args.quantization, "dry_run": True}
    results = Report("serving_layouts.py", detect(args.device), settings, wide=args.wide)
    precision = "FP8 weights and KV cache" if fp8 else "BF16"
    results.table("plan", f"Plan for {model.name}, {precision} (computed, nothing is started)", rows, PLAN_COLUMNS)
    refused = [f"{row['layout']} does not fit on {row['machine']}: {row['problem']}" for row in rows if row["problem"]]
    if refused and (args.layouts or len(refused) == len(rows)):
        raise CannotRun(refused[0])
    print("".join(f"{line}\n" for line in refused), end="")
    for layout, replicas in commands.items():
        print(f"\n{layout} (a run takes free ports)")
        print("\n".join(f"  {line}" for line in shell(replicas)))
    results.claims([not_applicable(claim, "a dry run measures nothing") for claim in ("S1", "S2", "S3", "S4")])
    results.save(args.json)
    if args.plot:
        plot_plan(args.plot, rows, model.name, args.machine)


def report(
    results: Report, args: argparse.Namespace, rows: list[dict], bests: dict[Layout, dict], model: Model | None
) -> None:
    """Print the claims by the best layout; write JSON and picture."""
    good = [layout for layout, best in bests.items() if best["best"] == targets.BEST]
    winner = max(good or bests, key=lambda layout: bests[layout]["tokens_per_s"])
    results.claims(claims(bests[winner], str(winner), winner.devices, model, results.machine))
    results.save(args.json)
    if args.plot:
        plot_layouts(args.plot, rows, bests[winner], results, simulated=model is None)


def compare(args: argparse.Namespace) -> None:
    """Measure all layouts."""
    machine = detect(args.device)
    quiet()
    host = machine if machine.device == "cuda" else replace(machine, count=CPU_RANKS)
    loads = loads_for(args, host)
    if args.quick:
        model, fp8, what = None, False, "stand-ins (simulated)"
    else:
        model, fp8 = model_for(args, machine)
        what = model.name + (" (random weights)" if model.dummy else "")
    layouts = choose(args, model, fp8, host)
    at_once = max(load.requests for load in loads)
    service = Service(model, machine, device_names(machine), at_once, args.quantization, args.seed, fp8)
    settings = {"model": what, "tokens_in": loads[0].tokens_in, "tokens_out": loads[0].tokens_out, "seed": args.seed}
    settings |= {"quantization": args.quantization, "ttft_ms": args.slo_ttft_ms, "tpot_ms": args.slo_tpot_ms}
    results = Report("serving_layouts.py", machine, settings, wide=args.wide)
    results.print_card()
    rows, bests = measure(results, args, layouts, service, loads)
    report(results, args, rows, bests, model)


def main() -> int:
    """Compare layouts, or print what they would be."""
    args = parse(__doc__, parse_layout)
    (dry_run if args.dry_run else compare)(args)
    return 0


if __name__ == "__main__":
    cli.run(main)
