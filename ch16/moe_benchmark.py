"""Mixture-of-experts benchmark: a synthetic layer predicts the throughput of a whole model.

A router sends each token to K of E experts. That saves arithmetic and adds bookkeeping: tokens are sorted by expert,
each expert is another small matrix product, and no router spreads its tokens evenly. This script times a layer with
random weights in three kinds of dispatch, beside vLLM's own kernel. It measures the cost of uneven routing, and
predicts the throughput of a whole model from one layer, checked against vLLM running that model.

One GPU shows the speed, `torchrun` on several shows expert parallelism; a CPU runs the same code on smaller layers.

    python3 ch16/moe_benchmark.py                                              # layer, routing, plan, check
    python3 ch16/moe_benchmark.py --quick --plot moe.png
    python3 ch16/moe_benchmark.py --preset mixtral-8x7b --target-tok-s 20000   # how many GPUs?
    torchrun --nproc-per-node 2 ch16/moe_benchmark.py --quick                  # experts spread over two processes

How to read the tables: the roofline is the larger of two physical limits, arithmetic and reading the weights of every
active expert. A few dozen tokens activate almost every expert, so decode is limited by memory. `grouped` comes close
to the roofline; `loop` does not, because it synchronises host and device once per expert.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import torch
import torch.nn as nn
from tqdm import tqdm

from ch16.parts.moe_benchmark import tables
from ch16.parts.moe_benchmark.capacity import Capacity, run_whole_model
from ch16.parts.moe_benchmark.experts import Dispatch, Experts, ExpertSizes, Routing, require_layer
from ch16.parts.moe_benchmark.parallel import measure_ranks
from ch16.parts.moe_benchmark.picture import plot_patterns, plot_ranks
from ch16.parts.moe_benchmark.plain import steps_on
from ch16.parts.moe_benchmark.planner import link_between_gpus
from ch16.parts.moe_benchmark.presets import PRESETS, Preset
from ch16.parts.moe_benchmark.reference import require_agreement, vllm_dispatch
from ch16.parts.moe_benchmark.routing import RANKS, make_routing, measure_routing
from ch16.parts.moe_benchmark.sizes import (
    MoESizes,
    Selection,
    chapter_presets,
    read_flags,
    select,
    sizes_from,
    whole_preset,
)
from ch16.parts.moe_benchmark.trained import read_with
from common import cli
from common.cli import CannotRun
from common.device import torch_dtype
from common.distributed import process_group
from common.engine import prepare_environment, quiet
from common.gpu import Machine, detect
from common.results import Report, Verdict, not_applicable
from common.timing import graphed, measure_together

# ---- configuration ----

CHAPTER = (
    {"num_experts": 8, "experts_per_token": 2},
    {"num_experts": 64, "experts_per_token": 2},
    {"num_experts": 64, "experts_per_token": 8},
)

# ---- mechanism ----


class SyntheticMoELayer(nn.Module):
    """A router and its experts, with random weights: K of E experts for each token of width H.

    Args:
        intermediate_size: width of an expert's inner layer; default: four times H.
        gated: SiLU-gated experts, as in published models; default: the chapter's GELU experts.
        dispatch: "loop", "grouped" or "fp8".

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
        require_layer(sizes, experts_per_token, dispatch, DISPATCH, device)
        self.num_experts, self.experts_per_token = num_experts, experts_per_token
        self.dispatch = DISPATCH[dispatch]
        self.router = nn.Linear(hidden_size, num_experts, bias=False, device=device, dtype=dtype)
        # The chapter has a module with biases per expert; ours are in two tensors, as a grouped product needs them.
        self.experts = Experts.random(sizes, device, dtype)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, S, H] or [T, H] to the same shape."""
        tokens = x.reshape(-1, x.shape[-1])  # [T, H]
        if len(tokens) == 0:
            raise CannotRun("zero tokens: there is nothing to route")
        router_logits = self.router(tokens)  # [T, E]
        routing_weights, selected_experts = router_logits.float().topk(self.experts_per_token, dim=-1)  # [T, K] each
        routing = Routing(selected_experts, routing_weights.softmax(dim=-1))
        return self.dispatch(tokens, self.experts, routing).view(x.shape)


def loop(x: torch.Tensor, experts: Experts, routing: Routing) -> torch.Tensor:
    """The chapter's loop: for each expert, pick its tokens, compute them, add the weighted results. [T, H]."""
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for i in range(experts.sizes.experts):
        # The chapter indexes the weights by a mask of tokens, which fails; `nonzero` gives the place of each choice.
        # It also synchronises host and device, once per expert.
        tokens, choice = (routing.experts == i).nonzero(as_tuple=True)
        if len(tokens) == 0:
            continue
        expert_output = experts.compute(x[tokens], i)
        weights = routing.weights[tokens, choice, None]
        output.index_add_(0, tokens, expert_output.float() * weights)
    return output.to(x.dtype)


def grouped(x: torch.Tensor, experts: Experts, routing: Routing, fp8: bool = False) -> torch.Tensor:
    """The same without a loop: sort rows by expert, two grouped products, weighted sum. [T, H].

    A row is a token for one of its K experts. On a GPU the steps are kernels that never wait for the host. In FP8, each
    row and each output row of a weight has its own scale.
    """
    if len(x) == 0:
        return x
    steps = steps_on(x.device)
    places, ends = steps.sort_rows(routing.experts, experts.sizes.experts)  # [T, K] of rows, [E] of experts
    rows = steps.arrange(x, places, fp8)  # [R, H], the rows of an expert side by side
    rows = steps.compute_sorted(rows, experts, ends)
    return steps.combine(rows, places, routing.weights)


DISPATCH: dict[str, Dispatch] = {"loop": loop, "grouped": grouped, "fp8": partial(grouped, fp8=True)}

# ---- measurement ----


@torch.no_grad()
def benchmark_moe(preset: Preset, experts: Experts, tokens: int, machine: Machine, sizes: MoESizes, seed: int) -> dict:
    """A row of LAYER_COLUMNS: every dispatch, and vLLM's kernel, on the same tokens and the same uniform routing."""
    x = torch.randn(tokens, preset.hidden, device=machine.device, dtype=experts.w_in.dtype)
    routing = make_routing("uniform", tokens, preset.experts, preset.top_k, seed, machine.device)
    contenders = {name: run for name, run in DISPATCH.items() if name != "fp8" or machine.native_fp8}
    vllms, why_no_vllm = vllm_dispatch(experts)
    if vllms:
        as_int = Routing(routing.experts.int(), routing.weights)  # as vLLM's router gives it
        contenders["vllm"] = lambda x, experts, _: vllms(x, experts, as_int)
    require_agreement(contenders, x, experts, routing, sizes.checked, preset.name)
    works = {name: partial(run, x, experts, routing) for name, run in contenders.items()}
    if machine.device == "cuda":  # the loop cannot be captured: it asks the host
        works = {name: work if name == "loop" else graphed(work) for name, work in works.items()}
    timings = measure_together(works, machine.device, repeats=sizes.repeats)
    seconds = {name: timing.median for name, timing in timings.items()}
    return tables.layer_row(preset, x, routing, seconds, machine, why_no_vllm)


def measure_layers(presets: Sequence[Preset], machine: Machine, sizes: MoESizes, seed: int) -> list[dict]:
    """Rows of LAYER_COLUMNS: every preset at every number of tokens. One layer's weights exist at a time."""
    rows = []
    for preset in tqdm(presets, desc="layers", leave=False, disable=None):
        options = {"intermediate_size": preset.intermediate, "gated": preset.gated, "device": machine.device}
        layer = SyntheticMoELayer(preset.hidden, preset.experts, preset.top_k, **options, dtype=torch_dtype(machine))
        rows += [benchmark_moe(preset, layer.experts, tokens, machine, sizes, seed) for tokens in sizes.tokens]
        del layer
    return rows


def measure(
    selection: Selection, args: argparse.Namespace, machine: Machine, sizes: MoESizes, results: Report
) -> tuple[list[dict], list[dict], str]:
    """Layers, routing and a plan, each table as soon as it exists: rows of patterns and of validation, or why none."""
    layers = measure_layers(selection.layers, machine, sizes, args.seed)
    columns = [c for c in tables.LAYER_COLUMNS if any(row.get(c.key) is not None for row in layers)]
    width = "published sizes" if args.preset else f"width {sizes.hidden} unless published"
    results.table("layers", f"One layer of experts, {width}, uniform routing", layers, columns)
    for why in dict.fromkeys(row["why_no_vllm"] for row in layers if "why_no_vllm" in row):
        print(f"  no figure for vLLM: {why}")

    routed, tokens, trained = selection.routed, max(sizes.tokens), []
    if model := selection.model:
        trained = read_with(model, selection.text, tokens, routed.top_k, machine)
        title = f"Routers of {model.name} reading {selection.source}, {tokens:,} tokens"
        results.table("trained", title, tables.balance_rows(trained, routed.experts), tables.TRAINED_COLUMNS)
    patterns = measure_routing(routed, grouped, trained, machine, sizes, args.seed)
    results.table("routing", tables.routing_title(routed), patterns, tables.PATTERN_COLUMNS)
    try:
        return patterns, *measure_capacity(whole_preset(args, machine), args, machine, sizes, results)
    except CannotRun as error:  # what was measured so far is not lost
        return patterns, [], str(error)
    except torch.OutOfMemoryError as error:
        return patterns, [], f"the plan ran out of GPU memory: {cli.first_line(error)}"


def measure_capacity(
    preset: Preset, args: argparse.Namespace, machine: Machine, sizes: MoESizes, results: Report
) -> tuple[list[dict], str]:
    """A plan for a whole model from one layer; where the model runs here, its validation by vLLM, or why not."""
    link, workload = link_between_gpus(machine, args.link_gb_s, args.link_latency_us), sizes.workload
    capacity = Capacity(preset, grouped, machine, link, sizes, args.seed)
    counts = [n for n in (1, 2, 4, 8) if preset.experts % n == 0 and (n == 1 or link.bytes_per_s)]
    plan = [capacity.plan_row(n) for n in tqdm(counts, desc="plan", leave=False, disable=None)]
    title = tables.plan_title(preset, machine, workload, capacity.dispatch_name)
    results.table("plan", title, plan, tables.PLAN_COLUMNS)
    print(tables.plan_notes(plan, link, args.target_tok_s))
    del capacity
    if args.quick or args.no_validation:
        return [], f"{'--quick' if args.quick else '--no-validation'} does not run the whole model"
    if plan[0]["fits"] == "no":
        return [], f"{preset.name} does not fit on one device here"
    validation = tables.validation_rows(plan[0], run_whole_model(preset, workload, machine, args.seed))
    title = f"The plan against vLLM running {preset.name} with random weights"
    results.table("validation", title, validation, tables.VALIDATION_COLUMNS)
    return validation, ""


# ---- main ----


def report(
    results: Report, verdicts: Sequence[Verdict], args: argparse.Namespace, picture: Callable, rows: Sequence[dict]
) -> None:
    """Print the claims, write the JSON, and draw `rows` by one of the pictures."""
    results.claims(verdicts)
    results.save(args.json)
    if args.plot:
        picture(args.plot, rows, results.settings["layer"], results.machine)


def main_alone(args: argparse.Namespace, machine: Machine) -> None:
    """One process: layers, routing, plan."""
    sizes = sizes_from(args, machine)
    if not (args.quick or args.no_validation):
        prepare_environment(machine)
    selection = select(args, machine, sizes, chapter_presets(CHAPTER, sizes))
    settings = {"seed": args.seed, "preset": args.preset, "model": selection.model and selection.model.name}
    settings["layer"] = selection.routed.name
    results = Report("moe_benchmark.py", machine, settings | asdict(sizes), wide=args.wide)
    results.print_card()
    for why in selection.left_out:
        print(f"left out: {why}")
    torch.manual_seed(args.seed)
    patterns, validation, why = measure(selection, args, machine, sizes, results)
    on_ranks = f"on the busiest of {RANKS} ranks (emulated)"
    verdicts = [tables.prediction_claim(validation, why), tables.uneven_load_claim(patterns, on_ranks)]
    report(results, verdicts, args, plot_patterns, patterns)


def main_of_rank(args: argparse.Namespace, machine: Machine) -> None:
    """One of several processes: experts spread over all of them. Rank 0 prints."""
    with process_group(machine.device) as ranks:
        try:
            sizes = sizes_from(args, machine)
            preset = PRESETS[args.preset] if args.preset else chapter_presets(CHAPTER, sizes)[-1]
            rows = measure_ranks(preset, grouped, machine, ranks, sizes, args.seed)
        except CannotRun:
            if ranks.rank == 0:
                raise
            sys.exit(1)  # all ranks have the same reason; rank 0 prints it
        if ranks.rank > 0:
            return
        world = ranks.world_size
        settings = {"seed": args.seed, "ranks": world, "preset": args.preset, "layer": preset.name}
        results = Report("moe_benchmark.py", machine, settings | asdict(sizes), wide=args.wide)
        results.print_card()
        title = f"{preset.name} of width {preset.hidden} over {world} ranks, {ranks.backend}"
        results.table("ranks", title, rows, tables.RANK_COLUMNS)
        no_plan = not_applicable("M1", "a plan is made by one process: run without torchrun")
        report(results, [no_plan, tables.uneven_load_claim(rows, f"over {world} ranks")], args, plot_ranks, rows)


def main() -> int:
    """Measure layers, routing and a plan, or under torchrun expert parallelism; print the claims."""
    args = read_flags(__doc__)
    machine = detect(args.device)
    quiet()
    (main_of_rank if args.ranks > 1 else main_alone)(args, machine)
    return 0


if __name__ == "__main__":
    cli.run(main)
