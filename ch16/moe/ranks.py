"""Expert parallelism measured: experts spread over this run's processes, against one process alone."""

import torch
import torch.distributed as dist

from ch16.moe.experts import TOLERANCE, Experts, Routing, grouped
from ch16.moe.parallel import ExpertParallel, measure_parallel
from ch16.moe.presets import Preset, require_memory
from ch16.moe.routing import PATTERNS, expert_load, make_routing, rank_load, require_divisible
from common.cli import CannotRun
from common.distributed import Ranks
from common.gpu import Machine
from common.results import Column

RANK_COLUMNS = (
    Column("pattern", "routing"),
    Column("tokens", "tokens a rank", ",d"),
    Column("rank_max_mean", "busiest rank, rows / mean", ".2f"),
    Column("step_ms", "layer ms", ".3f"),
    Column("compute_ms", "compute ms", ".3f"),
    Column("imbalance_ms", "imbalance ms", ".3f"),
    Column("exchange_ms", "exchange ms", ".3f"),
    Column("gb_per_s", "exchange GB/s a rank", ".2f"),
    Column("tokens_per_s", "tokens/s", ",.0f"),
    Column("rank_cost_percent", "time over balanced %", "+.1f"),
)


@torch.no_grad()
def measure_ranks(
    preset: Preset, tokens_list: tuple[int, ...], machine: Machine, ranks: Ranks, repeats: int, seed: int
) -> list[dict]:
    """Rows of RANK_COLUMNS for each number of tokens a rank and each routing pattern.

    Raises:
        CannotRun: experts do not divide by ranks, they do not fit in memory, or the outputs differ from one process's.
    """
    world = ranks.world_size
    require_divisible(preset.experts, world)
    copies = world if machine.device == "cpu" else 1  # on a CPU all ranks share the memory
    require_memory(preset, max(tokens_list), machine, copies)
    torch.manual_seed(seed)  # the same weights on every rank, which keeps its share and checks against the whole
    experts = Experts.random(preset.sizes, ranks.device.type)
    here, rows = preset.experts // world, []
    layer = ExpertParallel(experts.part(ranks.rank * here, here), ranks)
    for tokens in tokens_list:
        balanced = None
        for pattern in PATTERNS:
            routing = make_routing(pattern, tokens * world, preset.experts, preset.top_k, seed)
            load = expert_load(routing, preset.experts)
            by_rank = rank_load(load, world)
            mine = slice(ranks.rank * tokens, (ranks.rank + 1) * tokens)
            own = Routing(routing.experts[mine].to(ranks.device), routing.weights[mine].to(ranks.device))
            x = torch.randn(tokens, preset.hidden, device=ranks.device, dtype=torch.bfloat16)
            error = _largest_difference(layer(x, own), grouped(x, experts, own))
            if not error <= TOLERANCE:
                raise CannotRun(f"{world} ranks disagree with one process by {100 * error:.1f}%")
            seconds = measure_parallel(layer, x, own, 4 * repeats)  # processes meet at random moments
            leaving = 2 * x.element_size() * tokens * preset.top_k * preset.hidden * (world - 1) / world
            balanced = balanced or seconds["step"]  # the first pattern
            rows.append(
                {
                    "pattern": pattern,
                    "tokens": tokens,
                    "max_mean": float(load.max() / load.mean()),
                    "rank_max_mean": float(by_rank.max() / by_rank.mean()),
                    **{f"{name}_ms": 1e3 * value for name, value in seconds.items()},
                    "gb_per_s": leaving / seconds["exchange"] / 1e9,
                    "tokens_per_s": tokens * world / seconds["step"],
                    "rank_cost_percent": 100 * (seconds["step"] / balanced - 1),
                    "error": error,
                }
            )
    return rows


def _largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||, the largest of all ranks."""
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    dist.all_reduce(error, op=dist.ReduceOp.MAX)
    return error.item()
