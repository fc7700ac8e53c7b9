"""Expert parallelism: each rank keeps E / N experts and its own tokens; rows travel to their experts and back.

    sort      a rank's rows by expert, which is also by rank: rank r holds experts r E/N ... (r + 1) E/N - 1
    send      all_to_all: each rank gets the rows of its experts from all ranks
    compute   the grouped path on what arrived
    back      all_to_all the other way
    combine   weighted sum at home

The busiest rank decides how long `compute` takes: the others wait for its rows.
"""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ch16.moe.experts import Experts, Path, Routing, combine, grouped, sort_rows
from ch16.moe.routing import require_divisible
from common.distributed import Ranks


@dataclass(frozen=True)
class Exchange:
    """Who sends how many rows to whom, and what to do with them on arrival."""

    places: torch.Tensor  # [T, K]: where each row is among this rank's, sorted by expert
    sent: list[int]  # rows to each rank
    received: list[int]  # rows from each rank
    local: Routing  # the received rows' experts here, [R, 1]


class ExpertParallel:
    """A layer of experts spread over ranks.

    Args:
        shard: this rank's experts, E / N of them.
        ranks: this process among the others.

    Calling it is collective: every rank takes part with its own tokens x [T, H] and their routing over all E
    experts, and gets its tokens' outputs [T, H].
    """

    def __init__(self, shard: Experts, ranks: Ranks, path: Path = grouped) -> None:
        self.shard, self.ranks, self.path = shard, ranks, path

    def __call__(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Send rows to their experts, compute, bring them back, combine: [T, H] to the same shape."""
        exchange = self.agree(routing)
        rows = self.back(self.compute(self.send(x, exchange), exchange), exchange)
        return combine(rows, exchange.places, routing.weights)

    def agree(self, routing: Routing) -> Exchange:
        """Tell every rank how many rows of each of its experts will come. The host waits for the answer."""
        here, world = self.shard.sizes.experts, self.ranks.world_size
        places, ends = sort_rows(routing.experts, here * world)
        counts = torch.diff(ends, prepend=ends.new_zeros(1))  # [E]
        arriving = torch.empty_like(counts)  # [N, E / N]: from each rank, for each of my experts
        dist.all_to_all_single(arriving, counts)
        experts = torch.arange(here, device=counts.device).repeat(world).repeat_interleave(arriving)
        local = Routing(experts[:, None], torch.ones(len(experts), 1, device=counts.device))
        return Exchange(
            places, counts.view(world, here).sum(1).tolist(), arriving.view(world, here).sum(1).tolist(), local
        )

    def send(self, x: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        """Tokens x [T, H] to the ranks of their experts: the rows that arrive here."""
        rows = x.new_empty(exchange.places.numel(), x.shape[1])
        rows[exchange.places.flatten()] = x.repeat_interleave(exchange.places.shape[1], dim=0)
        arrived = x.new_empty(sum(exchange.received), x.shape[1])
        dist.all_to_all_single(arrived, rows, exchange.received, exchange.sent)
        return arrived

    def compute(self, rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        """The rows that arrived through this rank's experts; a rank may get none."""
        return self.path(rows, self.shard, exchange.local) if len(rows) else rows

    def back(self, rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        """Computed rows to where they came from, sorted by expert again."""
        home = rows.new_empty(exchange.places.numel(), rows.shape[1])
        dist.all_to_all_single(home, rows, exchange.sent, exchange.received)
        return home


def rank_part(routing: Routing, experts: int, rank: int, ranks: int) -> tuple[torch.Tensor, Routing]:
    """What one of `ranks` ranks would compute if it had to: token of each row [R], and their routing there [R, 1]."""
    require_divisible(experts, ranks)
    here = experts // ranks
    tokens, choice = (routing.experts // here == rank).nonzero(as_tuple=True)
    chosen = routing.experts[tokens, choice] - rank * here
    return tokens, Routing(chosen[:, None], torch.ones(len(tokens), 1, device=tokens.device))


def measure_parallel(layer: ExpertParallel, x: torch.Tensor, routing: Routing, repeats: int) -> dict[str, float]:
    """Medians over `repeats`, in seconds, the same on every rank.

    `step` is the whole layer. Its parts are timed apart, ranks starting each together: `compute` is the mean of the
    ranks, `imbalance` what the slowest adds to it, `exchange` sending rows there and back (the slowest rank's).
    """
    exchange = layer.agree(routing)
    arrived = layer.send(x, exchange)
    computed = layer.compute(arrived, exchange)
    works = {
        "step": lambda: layer(x, routing),
        "compute": lambda: layer.compute(arrived, exchange),
        "send": lambda: layer.send(x, exchange),
        "back": lambda: layer.back(computed, exchange),
    }
    slowest, mean = {}, {}
    for name, work in works.items():
        work()
        seconds = torch.tensor([_together(work, x) for _ in range(repeats)], dtype=torch.float64).median()
        across = torch.empty(layer.ranks.world_size, dtype=torch.float64, device=x.device)
        dist.all_gather_into_tensor(across, seconds.reshape(1).to(x.device))
        slowest[name], mean[name] = across.max().item(), across.mean().item()
    return {
        "step": slowest["step"],
        "compute": mean["compute"],
        "imbalance": slowest["compute"] - mean["compute"],
        "exchange": slowest["send"] + slowest["back"],
    }


def _together(work: object, x: torch.Tensor) -> float:
    """Seconds of one call, all ranks starting at once; the device has finished when the clock stops."""
    dist.barrier()
    _synchronize(x)
    start = time.perf_counter()
    work()
    _synchronize(x)
    return time.perf_counter() - start


def _synchronize(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()
