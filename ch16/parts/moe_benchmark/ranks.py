"""Expert parallelism measured: experts spread over this run's processes, against one process alone."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ch16.parts.moe_benchmark.experts import TOLERANCE, Experts, Routing, grouped
from ch16.parts.moe_benchmark.parallel import ExpertParallel, measure_parallel
from ch16.parts.moe_benchmark.presets import Preset, require_memory
from ch16.parts.moe_benchmark.routing import (
    PATTERNS,
    expert_load,
    make_routing,
    rank_load,
    require_divisible,
    rows_exchanged,
)
from common.cli import CannotRun
from common.device import torch_dtype
from common.distributed import Ranks
from common.gpu import Machine
from common.plots import draw, save_plot
from common.results import Column

RANK_COLUMNS = (
    Column("pattern", "routing"),
    Column("tokens", "tokens a rank", ",d"),
    Column("rank_max_mean", "busiest rank, rows / mean", ".2f"),
    Column("step_ms", "layer ms", ".3f"),
    Column("compute_ms", "compute ms", ".3f"),
    Column("imbalance_ms", "imbalance ms", ".3f"),
    Column("exchange_ms", "exchange ms", ".3f"),
    Column("rest_ms", "rest ms", ".3f"),
    Column("gb_per_s", "exchange GB/s, busiest rank", ".2f"),
    Column("tokens_per_s", "tokens/s", ",.0f"),
    Column("rank_cost_percent", "time over balanced %", "+.1f"),
    Column("rank_spread_percent", "spread of layer ms %", ".0f"),
)


def require_ranks(preset: Preset, tokens: int, machine: Machine, ranks: Ranks) -> None:
    """Raise CannotRun, on every rank alike, if one of them could not go on: before anything is allocated."""
    world, problem = ranks.world_size, None
    shared = world if machine.device == "cpu" else 1  # on a CPU all ranks share the memory
    try:
        require_divisible(preset.experts, world)
        require_memory(preset, tokens, machine, copies=shared, contenders=shared * world * len(PATTERNS))
    except CannotRun as error:
        problem = str(error)
    problems: list[str | None] = [None] * world
    dist.all_gather_object(problems, problem)
    if found := next(filter(None, problems), None):
        raise CannotRun(found)


@torch.no_grad()
def measure_ranks(
    preset: Preset, tokens_list: tuple[int, ...], machine: Machine, ranks: Ranks, repeats: int, seed: int
) -> list[dict]:
    """Rows of RANK_COLUMNS for each number of tokens a rank and each routing pattern.

    Raises:
        CannotRun: experts do not divide by ranks, they do not fit in memory, or the outputs differ from one process's.
    """
    require_ranks(preset, max(tokens_list), machine, ranks)
    world = ranks.world_size
    torch.manual_seed(seed)  # the same weights on every rank, which keeps its share and checks against the whole
    experts = Experts.random(preset.sizes, ranks.device.type, torch_dtype(machine))
    torch.manual_seed(seed + 1 + ranks.rank)  # other tokens on every rank
    here, rows = preset.experts // world, []
    layer = ExpertParallel(experts.part(ranks.rank * here, here), ranks)
    for tokens in tokens_list:
        cases, routings, errors = {}, {}, {}
        for pattern in PATTERNS:
            routing = make_routing(pattern, tokens * world, preset.experts, preset.top_k, seed)
            routings[pattern] = routing
            mine = slice(ranks.rank * tokens, (ranks.rank + 1) * tokens)
            own = Routing(routing.experts[mine].to(ranks.device), routing.weights[mine].to(ranks.device))
            x = torch.randn(tokens, preset.hidden, device=ranks.device, dtype=experts.w_in.dtype)
            errors[pattern] = _largest_difference(layer(x, own), grouped(x, experts, own))
            if not errors[pattern] <= TOLERANCE:
                raise CannotRun(f"{world} ranks disagree with one process by {100 * errors[pattern]:.1f}%")
            cases[pattern] = x, own
        seconds = measure_parallel(layer, cases, 4 * repeats)  # processes get out of step at random
        for pattern, (x, _) in cases.items():
            load, took = expert_load(routings[pattern], preset.experts), seconds[pattern]
            by_rank = rank_load(load, world)
            busiest = rows_exchanged(routings[pattern], world, here) * preset.hidden * x.element_size()
            rows.append(
                {
                    "pattern": pattern,
                    "tokens": tokens,
                    "max_mean": float(load.max() / load.mean()),
                    "rank_max_mean": float(by_rank.max() / by_rank.mean()),
                    **{f"{name}_ms": 1e3 * value for name, value in took.items() if name != "spread"},
                    "rank_spread_percent": 100 * took["spread"],
                    "gb_per_s": 2 * busiest / took["exchange"] / 1e9 if busiest else None,  # there and back
                    "tokens_per_s": tokens * world / took["step"],
                    "rank_cost_percent": 100 * (took["step"] / seconds[PATTERNS[0]]["step"] - 1),
                    "error": errors[pattern],
                }
            )
    return rows


def plot_ranks(path: str, rows: Sequence[dict]) -> None:
    """Where the time of a layer goes, a stack for each routing, one plot for each number of tokens."""
    sizes = sorted({row["tokens"] for row in rows})
    figure, axes = draw(len(sizes))
    for axis, tokens in zip(axes, sizes, strict=True):
        shown = [row for row in rows if row["tokens"] == tokens]
        names, below = [row["pattern"] for row in shown], [0.0] * len(shown)
        for part in ("compute", "imbalance", "exchange", "rest"):
            heights = [max(0.0, row[f"{part}_ms"]) for row in shown]  # the rest is a difference: noise can turn it
            axis.bar(names, heights, bottom=below, label=part)
            below = [low + height for low, height in zip(below, heights, strict=True)]
        axis.plot(names, [row["step_ms"] for row in shown], "k_", markersize=24, label="layer, measured whole")
        axis.set(title=f"{tokens:,} tokens a rank, ms", ylim=(0, 1.3 * max(row["step_ms"] for row in shown)))
        axis.legend(loc="upper center", ncols=3)
    save_plot(figure, path)


def _largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||, the largest of all ranks."""
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    dist.all_reduce(error, op=dist.ReduceOp.MAX)
    return error.item()
