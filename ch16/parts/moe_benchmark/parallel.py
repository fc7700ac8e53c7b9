"""Expert parallelism: each rank keeps E / N experts and its own tokens; rows travel to their experts and back.

    sort      a rank's rows by expert, which is also by rank: rank r holds experts r E/N ... (r + 1) E/N - 1
    send      all_to_all: each rank gets the rows of its experts from all ranks
    compute   the rows that arrived, through this rank's experts
    back      all_to_all in the other direction
    combine   weighted sum per token

The busiest rank decides how long `compute` takes: the other ranks wait for its rows.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ch16.parts.moe_benchmark.dispatch import steps_on
from ch16.parts.moe_benchmark.experts import Dispatch, Experts, Routing
from ch16.parts.moe_benchmark.plain import arrange, sort_rows
from ch16.parts.moe_benchmark.routing import expert_load, rank_load, require_divisible
from common.device import synchronise
from common.distributed import Ranks


@dataclass(frozen=True)
class Exchange:
    """How many rows travel between this rank and each other rank, and the experts they are for."""

    places: torch.Tensor  # [T, K]: where each row is among this rank's rows, sorted by expert
    sent: list[int]  # rows to each rank
    received: list[int]  # rows from each rank
    local: Routing  # the received rows' experts here, [R, 1]


class ExpertParallel:
    """A layer of experts spread over ranks.

    Args:
        shard: this rank's experts, E / N of them.
        ranks: this process among all.
        dispatch: how a rank computes the rows that arrived.

    Calling it is collective: every rank takes part with its own tokens x [T, H] and their routing over all E
    experts, and gets its tokens' outputs [T, H].
    """

    def __init__(self, shard: Experts, ranks: Ranks, dispatch: Dispatch) -> None:
        self.shard, self.ranks, self.dispatch = shard, ranks, dispatch

    def __call__(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Send rows to their experts, compute, bring them back, combine: [T, H] to the same shape."""
        exchange = self.agree(routing)
        arrived = self.send(arrange(x, exchange.places), exchange)
        rows = self.back(self.compute(arrived, exchange), exchange)
        return steps_on(x.device).combine(rows, exchange.places, routing.weights)

    def agree(self, routing: Routing) -> Exchange:
        """Tell every rank how many rows will arrive for each of its experts. The host waits for the answer."""
        share, world = self.shard.sizes.experts, self.ranks.world_size
        places, ends = sort_rows(routing.experts, share * world)
        counts = torch.diff(ends, prepend=ends.new_zeros(1))  # [E]
        arriving = torch.empty_like(counts)  # [N, E / N]: from each rank, for each expert of this rank
        dist.all_to_all_single(arriving, counts)
        experts = torch.arange(share, device=counts.device).repeat(world).repeat_interleave(arriving)
        local = Routing(experts[:, None], torch.ones(len(experts), 1, device=counts.device))
        return Exchange(
            places, counts.view(world, share).sum(1).tolist(), arriving.view(world, share).sum(1).tolist(), local
        )

    def send(self, rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        """Sorted rows to the ranks of their experts: the rows that arrive here."""
        return _all_to_all(rows, exchange.received, exchange.sent)

    def compute(self, rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        """The rows that arrived, through this rank's experts; there may be none."""
        return self.dispatch(rows, self.shard, exchange.local)

    def back(self, rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        """Computed rows to the ranks they came from, sorted by expert again."""
        return _all_to_all(rows, exchange.sent, exchange.received)


def _all_to_all(rows: torch.Tensor, received: list[int], sent: list[int]) -> torch.Tensor:
    arrived = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(arrived, rows, received, sent)
    return arrived


def rank_part(routing: Routing, experts: int, rank: int, ranks: int) -> tuple[torch.Tensor, Routing]:
    """What rank `rank` of `ranks` would compute: the token of each of its rows [R], and their routing there [R, 1]."""
    require_divisible(experts, ranks)
    share = experts // ranks
    tokens, choice = (routing.experts // share == rank).nonzero(as_tuple=True)
    chosen = routing.experts[tokens, choice] - rank * share
    return tokens, Routing(chosen[:, None], torch.ones(len(tokens), 1, device=tokens.device))


def busiest_part(routing: Routing, experts: int, ranks: int) -> tuple[int, torch.Tensor, Routing]:
    """The rank with the most rows, and its part as `rank_part` gives it."""
    busiest = int(rank_load(expert_load(routing, experts), ranks).argmax())
    return busiest, *rank_part(routing, experts, busiest, ranks)


@torch.no_grad()
def measure_parallel(
    layer: ExpertParallel, cases: Mapping[str, tuple[torch.Tensor, Routing]], repeats: int
) -> dict[str, dict[str, float]]:
    """Medians over `repeats` in seconds, the same on every rank; collective. Cases are timed turn by turn.

    Args:
        cases: by name, this rank's tokens x [T, H] and their routing.

    Returns:
        For each case: `step`, the whole layer, and its parts, each timed with all ranks starting together. `compute`
        is the mean of the ranks, `imbalance` what the slowest rank adds, `exchange` the two all_to_alls of rows, and
        `rest` the difference: agreeing on numbers of rows, sorting, weighted sums, and ranks out of step. `spread` is
        the interquartile range of `step` over its median, on the rank where it is largest.
    """
    works = {}
    for name, (x, routing) in cases.items():
        exchange = layer.agree(routing)
        rows = arrange(x, exchange.places)
        arrived = layer.send(rows, exchange)
        computed = layer.compute(arrived, exchange)
        works[name, "step"] = lambda x=x, routing=routing: layer(x, routing)
        works[name, "compute"] = lambda rows=arrived, exchange=exchange: layer.compute(rows, exchange)
        works[name, "send"] = lambda rows=rows, exchange=exchange: layer.send(rows, exchange)
        works[name, "back"] = lambda rows=computed, exchange=exchange: layer.back(rows, exchange)
    for work in works.values():
        work()
    device = layer.ranks.device
    rounds = [[_together(work, device) for work in works.values()] for _ in range(repeats)]
    levels = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    own = torch.tensor(rounds, dtype=torch.float64).quantile(levels, dim=0).contiguous().to(device)  # [3, works]
    gathered = [torch.empty_like(own) for _ in range(layer.ranks.world_size)]
    dist.all_gather(gathered, own)
    low, median, high = torch.stack(gathered, dim=1)  # each [ranks, works]
    slowest = dict(zip(works, median.amax(0).tolist(), strict=True))
    mean = dict(zip(works, median.mean(0).tolist(), strict=True))
    spread = dict(zip(works, ((high - low) / median).amax(0).tolist(), strict=True))
    found = {}
    for name in cases:
        parts = {"compute": mean[name, "compute"], "imbalance": slowest[name, "compute"] - mean[name, "compute"]}
        parts["exchange"] = slowest[name, "send"] + slowest[name, "back"]
        found[name] = {"step": slowest[name, "step"], **parts, "rest": slowest[name, "step"] - sum(parts.values())}
        found[name]["spread"] = spread[name, "step"]
    return found


def _together(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call with all ranks starting at once, until the device has finished."""
    dist.barrier()
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start
