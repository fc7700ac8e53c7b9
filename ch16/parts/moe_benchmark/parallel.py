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
from tqdm import tqdm

from ch16.parts.moe_benchmark.experts import Dispatch, Experts, Routing
from ch16.parts.moe_benchmark.plain import arrange, sort_rows, steps_on
from ch16.parts.moe_benchmark.presets import Preset, require_memory
from ch16.parts.moe_benchmark.reference import TOLERANCE
from ch16.parts.moe_benchmark.routing import (
    PATTERNS,
    REFERENCE,
    expert_load,
    make_routing,
    rank_load,
    require_divisible,
    rows_exchanged,
)
from ch16.parts.moe_benchmark.sizes import MoESizes
from common.cli import CannotRun
from common.device import synchronise, torch_dtype
from common.distributed import Ranks
from common.gpu import Machine


@dataclass(frozen=True)
class Exchange:
    """How many rows travel between this rank and each other rank, and the experts they are for."""

    places: torch.Tensor  # [T, K]: where each row is among this rank's rows, sorted by expert
    sent: list[int]  # rows to each rank
    received: list[int]  # rows from each rank
    local: Routing  # the received rows' experts here, [R, 1]


class ExpertParallel:
    """A layer of experts spread over ranks: `shard` is this rank's E / N, `dispatch` computes the rows that arrive.

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
        sent, received = (rows.view(world, share).sum(1).tolist() for rows in (counts, arriving))
        return Exchange(places, sent, received, local)

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


@torch.no_grad()
def measure_parallel(
    layer: ExpertParallel, cases: Mapping[str, tuple[torch.Tensor, Routing]], repeats: int
) -> dict[str, dict[str, float]]:
    """Medians over `repeats` in seconds, the same on every rank; collective. Cases are timed turn by turn.

    A case is this rank's tokens x [T, H] and their routing. Its `step` is the whole layer. Parts are timed with all
    ranks starting together: `compute` is the mean of the ranks, `imbalance` what the slowest rank adds, `exchange` the
    two all_to_alls of rows, and `rest` the difference: agreeing on numbers of rows, sorting, weighted sums, and ranks
    out of step. `spread` is the interquartile range of `step` over its median, on the rank where it is largest.
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


def require_ranks(preset: Preset, tokens: int, machine: Machine, ranks: Ranks) -> None:
    """Raise CannotRun on every rank if any rank cannot go on, before anything is allocated."""
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
    preset: Preset, dispatch: Dispatch, machine: Machine, ranks: Ranks, sizes: MoESizes, seed: int
) -> list[dict]:
    """Rows of RANK_COLUMNS for each number of tokens per rank and each routing pattern.

    Raises:
        CannotRun: experts do not divide by ranks, they do not fit in memory, or the outputs differ from one process's.
    """
    require_ranks(preset, max(sizes.tokens), machine, ranks)
    world = ranks.world_size
    torch.manual_seed(seed)  # the same weights on every rank, which keeps its share and checks against the whole
    experts = Experts.random(preset.sizes, ranks.device.type, torch_dtype(machine))
    torch.manual_seed(seed + 1 + ranks.rank)  # other tokens on every rank
    share, rows = preset.experts // world, []
    layer = ExpertParallel(experts.part(ranks.rank * share, share), ranks, dispatch)
    for tokens in tqdm(sizes.tokens, desc="ranks", leave=False, disable=None if ranks.rank == 0 else True):
        cases, routings, errors = {}, {}, {}
        for pattern in PATTERNS:
            routing = make_routing(pattern, tokens * world, preset.experts, preset.top_k, seed)
            routings[pattern] = routing
            own = routing[ranks.rank * tokens : (ranks.rank + 1) * tokens]
            own = Routing(own.experts.to(ranks.device), own.weights.to(ranks.device))
            x = torch.randn(tokens, preset.hidden, device=ranks.device, dtype=experts.w_in.dtype)
            errors[pattern] = _largest_difference(layer(x, own), dispatch(x, experts, own))
            if not errors[pattern] <= TOLERANCE:
                raise CannotRun(f"{world} ranks disagree with one process by {100 * errors[pattern]:.1f}%")
            cases[pattern] = x, own
        seconds = measure_parallel(layer, cases, 4 * sizes.repeats)  # processes get out of step at random
        for pattern in PATTERNS:
            row = _row(preset, experts.w_in.element_size(), routings[pattern], world, seconds[pattern])
            row["rank_cost_percent"] = 100 * (seconds[pattern]["step"] / seconds[REFERENCE]["step"] - 1)
            rows.append({"pattern": pattern, "tokens": tokens, **row, "error": errors[pattern]})
    return rows


def _row(preset: Preset, itemsize: int, routing: Routing, world: int, seconds: Mapping[str, float]) -> dict:
    """The load of `world` ranks, and the seconds of `measure_parallel`: keys of RANK_COLUMNS."""
    load = expert_load(routing, preset.experts)
    by_rank = rank_load(load, world)
    busiest = rows_exchanged(routing, world, preset.experts // world) * preset.hidden * itemsize
    return {
        "max_mean": float(load.max() / load.mean()),
        "rank_max_mean": float(by_rank.max() / by_rank.mean()),
        **{f"{name}_ms": 1e3 * value for name, value in seconds.items() if name != "spread"},
        "rank_spread_percent": 100 * seconds["spread"],
        "gb_per_s": 2 * busiest / seconds["exchange"] / 1e9 if busiest else None,  # there and back
        "tokens_per_s": len(routing.experts) / seconds["step"],
    }


def _largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||, the largest of all ranks."""
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    dist.all_reduce(error, op=dist.ReduceOp.MAX)
    return error.item()
