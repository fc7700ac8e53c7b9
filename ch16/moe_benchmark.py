"""Mixture-of-experts benchmark: a synthetic layer that predicts what a whole model will do.

A router sends each token to K of E experts. That saves arithmetic and costs bookkeeping: tokens have to be sorted by
expert, every expert is another small matrix product, and no router spreads its tokens evenly. This script measures a
layer with random weights by three ways of dispatch, beside vLLM's own kernel; what uneven routing costs; and from
one layer the throughput of a whole model, checked against vLLM running that model.

One GPU shows the speed, `torchrun` on several shows expert parallelism; a CPU runs the same code on smaller layers.

    python3 ch16/moe_benchmark.py                                              # layer, routing, plan, check
    python3 ch16/moe_benchmark.py --quick --plot moe.png
    python3 ch16/moe_benchmark.py --preset mixtral-8x7b --target-tok-s 20000   # how many GPUs?
    torchrun --nproc-per-node 2 ch16/moe_benchmark.py --quick                  # experts spread over two processes

How to read the tables: `limit` is the larger of two physical limits, arithmetic and reading the weights of every
expert that got a token. Few tokens wake many experts, so decode is limited by memory; `grouped` comes close to it,
`loop` does not, because the host asks the device about every expert.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
from tqdm import tqdm

from ch16.parts.moe_benchmark.baseline import vllm_path
from ch16.parts.moe_benchmark.capacity import (
    PLAN_COLUMNS,
    VALIDATION_COLUMNS,
    Capacity,
    planning_bytes,
    run_whole_model,
    validation_rows,
)
from ch16.parts.moe_benchmark.experts import (
    PATHS,
    TOLERANCE,
    TOLERANCE_FP8,
    Experts,
    ExpertSizes,
    Routing,
    check_input,
    reference,
    route,
)
from ch16.parts.moe_benchmark.patterns import PATTERN_COLUMNS, RANKS, measure_routing, plot_patterns
from ch16.parts.moe_benchmark.planner import Workload, gpus_needed, gpus_text, link_between_gpus
from ch16.parts.moe_benchmark.presets import PRESETS, Preset, from_config, require_memory, those_that_fit
from ch16.parts.moe_benchmark.ranks import RANK_COLUMNS, measure_ranks, plot_ranks
from ch16.parts.moe_benchmark.routing import expert_load, make_routing
from ch16.parts.moe_benchmark.trained import TRAINED_COLUMNS, balance_rows, read_with
from common import cli, models
from common.cli import CannotRun
from common.device import torch_dtype
from common.distributed import process_group
from common.engine import prepare_environment, quiet
from common.gpu import DTYPE_NAMES, Machine, detect
from common.results import Column, Report, Verdict, judge, not_applicable
from common.text import read_text
from common.timing import graphed, measure_together

# ---- configuration: the chapter's layers, and sizes that show them ----

CHAPTER = (  # hidden size, then
    {"num_experts": 8, "experts_per_token": 2},
    {"num_experts": 64, "experts_per_token": 2},
    {"num_experts": 64, "experts_per_token": 8},
)
ERROR_TARGET_PERCENT = 15.0  # of the predicted throughput of a whole model
WEIGHT_COPIES = 2  # at most: ours, and in FP8 or as vLLM's CPU kernel packs them
COST_TARGET_PERCENT = 5.0  # from here on imbalance "costs throughput"


@dataclass(frozen=True)
class Sizes:
    """How much is measured: width of the chapter's layers, tokens of decode and prefill, what is validated."""

    hidden: int
    gated_intermediate: int
    tokens: tuple[int, ...]
    repeats: int
    workload: Workload
    presets: tuple[str, ...]  # published layers to measure beside the chapter's
    checked: int = 16  # tokens compared with float64


def sizes_for(machine: Machine, quick: bool) -> Sizes:
    """Sizes that fill a GPU, or end in time on two CPU cores."""
    if machine.device == "cuda":
        published = ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3")
        full = Sizes(4096, 2048, (64, 8192), 20, Workload(128, 256, 256), published)
        return replace(full, repeats=10, presets=published[1:2]) if quick else full
    full = Sizes(512, 256, (16, 512), 7, Workload(16, 64, 48, chunk=2048), ("small-moe",))
    return replace(full, hidden=256, repeats=5, presets=()) if quick else full


# ---- mechanism: the chapter's layer ----


class SyntheticMoELayer(nn.Module):
    """A router and its experts on random weights.

    Args:
        hidden_size: width H of a token.
        num_experts: E.
        experts_per_token: K, at most E.
        intermediate_size: width of an expert's inner layer; default: four times H.
        gated: SiLU-gated experts, as published models have them; default: the chapter's GELU experts.
        dispatch: "loop", "grouped" or "fp8".
        device, dtype: of the weights. Experts have no biases.

    Raises:
        CannotRun: K exceeds E, a size is not positive, or `dispatch` is unknown or not for this device.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 64,
        experts_per_token: int = 2,
        *,
        intermediate_size: int | None = None,
        gated: bool = False,
        dispatch: str = "grouped",
        device: str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        intermediate = 4 * hidden_size if intermediate_size is None else intermediate_size
        sizes = ExpertSizes(hidden_size, intermediate, num_experts, gated)
        if min(hidden_size, sizes.intermediate, num_experts, experts_per_token) < 1:
            raise CannotRun("sizes, experts and experts per token must be at least 1")
        if experts_per_token > num_experts:
            raise CannotRun(f"{experts_per_token} experts per token, but there are {num_experts}")
        if dispatch not in PATHS:
            raise CannotRun(f"dispatch must be one of {', '.join(PATHS)}, not '{dispatch}'")
        if dispatch == "fp8" and torch.device(device).type == "cpu":
            raise CannotRun("dispatch 'fp8' needs a GPU with FP8 units")
        self.num_experts, self.experts_per_token = num_experts, experts_per_token
        self.path = PATHS[dispatch]
        self.router = nn.Linear(hidden_size, num_experts, bias=False, device=device, dtype=dtype)
        self.experts = Experts.random(sizes, device, dtype)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, S, H] or [T, H] to the same shape."""
        tokens = x.reshape(-1, x.shape[-1])  # [T, H]
        routing = route(self.router(tokens), self.experts_per_token)
        check_input(tokens, routing, self.experts.sizes)
        return self.path(tokens, self.experts, routing).view(x.shape)


# ---- measurement: one layer, every path, the same tensors ----

LAYER_COLUMNS = (
    Column("layer", "layer"),
    Column("tokens", "tokens", ",d"),
    Column("active_experts", "experts awake", "d"),
    Column("loop_ms", "loop ms", ".2f"),
    Column("grouped_ms", "grouped ms", ".3f"),
    Column("fp8_ms", "FP8 ms", ".3f"),
    Column("vllm_ms", "vLLM ms", ".3f"),
    Column("over_loop", "grouped over loop", ".2f"),
    Column("over_vllm", "over vLLM", ".2f"),
    Column("fp8_over_grouped", "FP8 over grouped", ".2f"),
    Column("tokens_per_s", "tokens/s", ",.0f"),
    Column("tflops", "TFLOP/s", ".3g"),
    Column("gb_per_s", "GB/s", ",.0f"),
    Column("compute_limit_ms", "compute limit ms", ".3f"),
    Column("memory_limit_ms", "memory limit ms", ".3f"),
    Column("limit_percent", "of limit %", ".0f"),
)


@torch.no_grad()
def benchmark_moe(preset: Preset, experts: Experts, tokens: int, machine: Machine, sizes: Sizes, seed: int) -> dict:
    """All dispatch paths on the same tokens and the same (uniform) routing; a row of LAYER_COLUMNS.

    Figures from `tokens/s` on are of the grouped path. Its bytes are those that must move: weights of experts with
    tokens, and the tokens in and out, once.

    Raises:
        CannotRun: a path disagrees with float64.
    """
    x = torch.randn(tokens, preset.hidden, device=machine.device, dtype=experts.w_in.dtype)
    routing = make_routing("uniform", tokens, preset.experts, preset.top_k, seed, machine.device)
    paths = {name: path for name, path in PATHS.items() if name != "fp8" or machine.native_fp8}
    theirs, why_not = vllm_path(experts)
    if theirs:
        their_routing = Routing(routing.experts.int(), routing.weights)  # as vLLM's router gives it
        paths["vllm"] = lambda x, experts, _: theirs(x, experts, their_routing)
    some = torch.linspace(0, tokens - 1, min(tokens, sizes.checked), device=x.device).long()
    expected = reference(x[some], experts, Routing(routing.experts[some], routing.weights[some]))
    for name, path in paths.items():
        error = ((path(x, experts, routing)[some].double() - expected).norm() / expected.norm()).item()
        if not error <= (TOLERANCE_FP8 if name == "fp8" else TOLERANCE):
            raise CannotRun(f"the {name} path is wrong by {100 * error:.1f}% (relative to float64, {preset.name})")

    def ready(name: str) -> Callable[[], object]:
        def work() -> torch.Tensor:
            return paths[name](x, experts, routing)

        return graphed(work) if machine.device == "cuda" and name != "loop" else work  # the loop asks the host

    timings = measure_together({name: ready(name) for name in paths}, machine.device, repeats=sizes.repeats)
    seconds = {name: timing.median for name, timing in timings.items()}
    ours, rows = seconds["grouped"], tokens * preset.top_k
    active = int((expert_load(routing, preset.experts) > 0).sum())
    moved = x.element_size() * (active * preset.sizes.parameters + 2 * tokens * preset.hidden)
    flops, peak = preset.sizes.flops(rows), machine.peak
    limits = (flops / peak.bf16_flops, moved / peak.bytes_per_s) if peak.bf16_flops and peak.bytes_per_s else None
    row = {"layer": preset.name, "tokens": tokens, **{f"{name}_ms": 1e3 * s for name, s in seconds.items()}}
    row |= {"over_loop": seconds["loop"] / ours, "tokens_per_s": tokens / ours}
    row |= {"tflops": flops / ours / 1e12, "gb_per_s": moved / ours / 1e9, "active_experts": active}
    row |= {"over_vllm": seconds["vllm"] / ours} if theirs else {"why_no_vllm": why_not}
    if "fp8" in seconds:
        row["fp8_over_grouped"] = ours / seconds["fp8"]
    if limits:
        row |= {"compute_limit_ms": 1e3 * limits[0], "memory_limit_ms": 1e3 * limits[1]}
        row["limit_percent"] = 100 * max(limits) / ours
    return row


def chapter_presets(sizes: Sizes) -> list[Preset]:
    """The chapter's three configurations, and two with gated experts of the size today's models have."""
    layers = [
        Preset(
            f"{c['num_experts']} experts, top-{c['experts_per_token']}",
            sizes.hidden,
            4 * sizes.hidden,
            c["num_experts"],
            c["experts_per_token"],
            gated=False,
        )
        for c in CHAPTER
    ]
    return layers + [
        Preset(f"64 gated experts, top-{k}", sizes.hidden, sizes.gated_intermediate, 64, k) for k in (2, 8)
    ]


# ---- claims ----


def prediction_claim(checked: Sequence[dict], why_not: str) -> Verdict:
    """M1 from the rows of VALIDATION_COLUMNS; without any, n/a with the reason."""
    if not checked:
        return not_applicable("M1", why_not)
    throughput = checked[0]
    error, text = throughput["error_percent"], "predicted {predicted:,.0f}, measured {measured:,.0f} output tok/s"
    return judge("M1", abs(error) <= ERROR_TARGET_PERCENT, f"{text.format(**throughput)}: {error:+.1f}%")


def uneven_load_claim(patterns: Sequence[dict], on_ranks: str) -> Verdict:
    """M2: of the trained routers if there are some, else of simulated Zipf routing, where it costs most.

    A cost that is larger than its own spread comes before larger ones that are not.
    """
    trained = [row for row in patterns if row["pattern"].startswith("trained")]
    candidates = trained or [row for row in patterns if row["pattern"] == "zipf"]
    places = {"": "on one device", "rank_": on_ranks}
    costs = [
        (row[f"{of}cost_percent"], row.get(f"{of}spread_percent", 0.0), row, where)
        for row in candidates
        for of, where in places.items()
        if f"{of}cost_percent" in row
    ]
    cost, spread, row, where = max(costs, key=lambda found: (found[0] >= max(COST_TARGET_PERCENT, found[1]), found[0]))
    text = (
        f"{row['pattern']} routing{'' if trained else ' (simulated)'}, {row['tokens']:,} tokens: busiest expert "
        f"{row['max_mean']:.1f}x the mean, time over balanced routing {cost:+.0f}% {where}"
    )
    if abs(cost) < spread:
        return not_applicable("M2", f"that is less than repeated runs differ ({spread:.0f}%)", text)
    return judge("M2", cost >= COST_TARGET_PERCENT, text)


# ---- the script ----


def measure_layers(presets: Sequence[Preset], machine: Machine, sizes: Sizes, seed: int) -> list[dict]:
    """Rows of LAYER_COLUMNS: every preset at every number of tokens. One layer's weights exist at a time."""
    rows = []
    for preset in tqdm(presets, desc="layers", leave=False, disable=None):
        layer = SyntheticMoELayer(
            preset.hidden,
            preset.experts,
            preset.top_k,
            intermediate_size=preset.intermediate,
            gated=preset.gated,
            device=machine.device,
            dtype=torch_dtype(machine),
        )
        rows += [benchmark_moe(preset, layer.experts, tokens, machine, sizes, seed) for tokens in sizes.tokens]
        del layer
    return rows


def sizes_from(args: argparse.Namespace, machine: Machine) -> Sizes:
    """The machine's sizes, with what the flags change.

    Raises:
        CannotRun: --tokens is not a list of positive numbers.
    """
    sizes = sizes_for(machine, args.quick)
    if args.tokens is not None:
        try:
            tokens = tuple(sorted(int(word) for word in args.tokens.split(",")))
        except ValueError:
            raise CannotRun(f"--tokens takes numbers, as in 64,8192, not '{args.tokens}'") from None
        if tokens[0] < 1:
            raise CannotRun(f"--tokens {tokens[0]}: there is nothing to route")
        sizes = replace(sizes, tokens=tokens)
    if args.hidden_size:
        sizes = replace(sizes, hidden=args.hidden_size, gated_intermediate=max(1, args.hidden_size // 2))
    if args.sequences:
        sizes = replace(sizes, workload=replace(sizes.workload, sequences=args.sequences))
    return sizes


def whole_preset(args: argparse.Namespace, machine: Machine) -> Preset:
    """The model to plan for: --preset, else the largest that runs here with room for its KV cache.

    Raises:
        CannotRun: of --preset only a layer is known.
    """
    if args.preset:
        if not PRESETS[args.preset].layers:
            raise CannotRun(f"of {args.preset} only the layer of experts is known here")
        return PRESETS[args.preset]
    for name in ("qwen3-30b-a3b", "olmoe-1b-7b") if machine.device == "cuda" else ():
        if 2 * PRESETS[name].parameters <= 0.8 * machine.memory_bytes:
            return PRESETS[name]
    return PRESETS["small-moe"]


def measure_capacity(
    preset: Preset, args: argparse.Namespace, report: Report, machine: Machine, sizes: Sizes
) -> tuple[list[dict], str]:
    """Print the plan and, where the whole model runs here, the check against vLLM.

    Returns:
        Rows of VALIDATION_COLUMNS, or none and why.
    """
    link, workload = link_between_gpus(machine, args.link_gb_s, args.link_latency_us), sizes.workload
    more = planning_bytes(preset, workload, machine.itemsize)
    require_memory(preset, workload.chunk, machine, copies=WEIGHT_COPIES, contenders=2, more=more)
    capacity = Capacity(preset, machine, link, sizes.repeats, args.seed)
    counts = [n for n in (1, 2, 4, 8) if preset.experts % n == 0 and (n == 1 or link.bytes_per_s)]
    rows = [capacity.plan_row(workload, n) for n in tqdm(counts, desc="plan", leave=False, disable=None)]
    title = (
        f"Plan for {preset.name} in {DTYPE_NAMES[machine.dtype]}, {workload.sequences} sequences at once, "
        f"{workload.tokens_in} tokens in and {workload.tokens_out} out; from one layer, experts by {capacity.path_name}"
    )
    report.table("plan", title, rows, PLAN_COLUMNS)
    if len(counts) > 1:
        print(f"  more than one GPU: emulated one after another on this one, uniform routing; exchange: {link.source}")
    elif preset.experts > 1:
        print("  one device only: nothing is known about a link to others; --link-gb-s N adds 2, 4 and 8")
    if args.target_tok_s:
        needed = gpus_text(gpus_needed(rows, args.target_tok_s), counts[-1])
        print(f"  {args.target_tok_s:,} output tok/s need {needed}")
    del capacity
    if args.quick or args.no_validation:
        return [], f"{'--quick' if args.quick else '--no-validation'} does not run the whole model"
    if rows[0]["fits"] == "no":
        return [], f"{preset.name} does not fit on one device here"
    measured = run_whole_model(preset, workload, machine, args.seed)
    checked = validation_rows(rows[0], measured)
    title = f"The plan against vLLM running {preset.name} with random weights"
    report.table("validation", title, checked, VALIDATION_COLUMNS)
    return checked, ""


def main_alone(args: argparse.Namespace, machine: Machine, sizes: Sizes) -> int:
    """One process: layers, routing, plan."""
    needs = {"copies": WEIGHT_COPIES, "contenders": len(PATHS) + 1}
    presets = [PRESETS[args.preset]] if args.preset else chapter_presets(sizes) + [PRESETS[n] for n in sizes.presets]
    presets, left_out = those_that_fit(presets, max(sizes.tokens), machine, **needs)
    if left_out and (args.hidden_size or args.tokens):  # asked for, not a default
        raise CannotRun(left_out[0])
    routed, trained = PRESETS[args.preset] if args.preset else chapter_presets(sizes)[-1], []
    if args.model:  # with --preset, too: its routers have as many experts as it has
        model = models.resolve(args.model, machine)
        routed = from_config(model.name, model.config)
        text, source = read_text(args.text)
    require_memory(routed, max(sizes.tokens), machine, contenders=8)

    settings = {"seed": args.seed, "preset": args.preset, "model": model.name if args.model else None}
    report = Report("moe_benchmark.py", machine, settings | asdict(sizes))
    report.print_card()
    for why in left_out:
        print(f"left out: {why}")
    torch.manual_seed(args.seed)
    layers = measure_layers(presets, machine, sizes, args.seed)
    columns = [c for c in LAYER_COLUMNS if any(row.get(c.key) is not None for row in layers)]
    width = "published sizes" if args.preset else f"width {sizes.hidden} unless published"
    report.table("layers", f"One layer of experts, {width}, uniform routing", layers, columns)

    for why in dict.fromkeys(row["why_no_vllm"] for row in layers if "why_no_vllm" in row):
        print(f"  no figure for vLLM: {why}")

    if args.model:
        trained = read_with(model, text, max(sizes.tokens), routed.top_k, machine)
        title = f"Routers of {model.name} reading {source}, {max(sizes.tokens):,} tokens"
        report.table("trained", title, balance_rows(trained, routed.experts), TRAINED_COLUMNS)
    patterns = measure_routing(routed, trained, machine, sizes.tokens, sizes.repeats, args.seed)
    title = f"What routing costs, {routed.name}, grouped; all but trained routing is simulated"
    report.table("routing", title, patterns, PATTERN_COLUMNS)

    try:
        checked, why = measure_capacity(whole_preset(args, machine), args, report, machine, sizes)
    except CannotRun as error:  # what was measured so far is not lost
        checked, why = [], str(error)
    except torch.OutOfMemoryError as error:
        checked, why = [], f"the plan ran out of GPU memory: {cli.first_line(error)}"
    report.claims(
        [prediction_claim(checked, why), uneven_load_claim(patterns, f"on the busiest of {RANKS} ranks (emulated)")]
    )
    report.save(args.json)
    if args.plot:
        plot_patterns(args.plot, patterns)
    return 0


def main_of_rank(args: argparse.Namespace, machine: Machine) -> int:
    """One of several processes: experts spread over all of them. Rank 0 prints."""
    with process_group(machine.device) as ranks:
        try:
            sizes = sizes_from(args, machine)
            preset = PRESETS[args.preset] if args.preset else chapter_presets(sizes)[-1]
            rows = measure_ranks(preset, sizes.tokens, machine, ranks, sizes.repeats, args.seed)
        except CannotRun:
            if ranks.rank == 0:
                raise
            sys.exit(1)  # every rank has the same reason: one of them says it
        if ranks.rank == 0:
            settings = {"seed": args.seed, "ranks": ranks.world_size, "preset": args.preset}
            report = Report("moe_benchmark.py", machine, settings | asdict(sizes))
            report.print_card()
            title = f"{preset.name} of width {preset.hidden} over {ranks.world_size} ranks, {ranks.backend}"
            report.table("ranks", title, rows, RANK_COLUMNS)
            why = "a plan is made by one process: run without torchrun"
            report.claims([not_applicable("M1", why), uneven_load_claim(rows, f"over {ranks.world_size} ranks")])
            report.save(args.json)
            if args.plot:
                plot_ranks(args.plot, rows)
    return 0


def main() -> int:
    """Measure layers, routing and a plan, or under torchrun expert parallelism; print the claims."""
    parser = cli.standard_parser(__doc__, model_help="trained MoE whose routers are measured: a folder or a hub id")
    parser.set_defaults(model=None)
    parser.add_argument("--preset", choices=sorted(PRESETS), help="only this model's layer, routing and plan")
    parser.add_argument("--hidden-size", type=cli.positive_int, metavar="H", help="width of the chapter's layers")
    parser.add_argument("--tokens", metavar="A,B", help="tokens of a layer's input, as in 64,8192")
    parser.add_argument("--sequences", type=cli.positive_int, metavar="N", help="requests at once in the plan")
    parser.add_argument("--target-tok-s", type=cli.positive_int, metavar="N", help="say how many GPUs give this")
    parser.add_argument(
        "--link-gb-s", type=cli.positive_float, metavar="N", help="between GPUs; default: the data sheet's"
    )
    parser.add_argument(
        "--link-latency-us", type=cli.positive_float, metavar="N", help="of each of the two exchanges in a layer"
    )
    parser.add_argument("--no-validation", action="store_true", help="do not run the whole model on vLLM")
    parser.add_argument("--text", metavar="FILE", help="for --model to read; default: Python's language reference")
    args = parser.parse_args()
    one_of_many = int(os.environ.get("WORLD_SIZE", 1)) > 1
    plan_flags = (args.sequences, args.target_tok_s, args.link_gb_s, args.link_latency_us, args.no_validation)
    if one_of_many and any((args.model, args.text, *plan_flags)):
        parser.error("--model, --text and the flags of the plan belong to a run without torchrun")
    if args.hidden_size and args.preset:
        parser.error("--hidden-size is for the chapter's layers; a --preset has its own width")
    if args.target_tok_s and args.preset and not PRESETS[args.preset].layers:
        parser.error(f"--target-tok-s needs a whole model; of {args.preset} only the layer of experts is known here")

    machine = detect(args.device)
    quiet()
    if one_of_many:
        return main_of_rank(args, machine)
    sizes = sizes_from(args, machine)
    if not (args.quick or args.no_validation):
        prepare_environment(machine)
    return main_alone(args, machine, sizes)


if __name__ == "__main__":
    cli.run(main)
