"""What uneven routing costs, on one device and for the busiest of several ranks."""

from collections.abc import Mapping, Sequence

import torch

from ch16.moe.experts import Experts, Routing, grouped
from ch16.moe.parallel import busiest_part
from ch16.moe.routing import CAPACITY_FACTOR, expert_load, load_balance, rank_load
from common.gpu import Machine
from common.plots import draw, save_plot
from common.results import Column
from common.timing import graphed, measure_together

RANKS = 8  # emulated: what the busiest of so many would compute
REFERENCE = "balanced"

PATTERN_COLUMNS = (
    Column("pattern", "routing"),
    Column("tokens", "tokens", ",d"),
    Column("max_mean", "max / mean", ".2f"),
    Column("cv", "CV", ".2f"),
    Column("entropy", "entropy", ".3f"),
    Column("empty_percent", "empty %", ".1f"),
    Column("dropped_percent", f"dropped at {CAPACITY_FACTOR} %", ".1f"),
    Column("ms", "ms", ".3f"),
    Column("cost_percent", "time over balanced %", "+.1f"),
    Column("rank_max_mean", f"busiest of {RANKS} ranks: rows / mean", ".2f"),
    Column("rank_ms", "its ms (emulated)", ".3f"),
    Column("rank_cost_percent", "its time over balanced %", "+.1f"),
)


@torch.no_grad()
def measure_patterns(
    routings: Mapping[str, Routing], x: torch.Tensor, experts: Experts, machine: Machine, repeats: int
) -> list[dict]:
    """Rows of PATTERN_COLUMNS for tokens x [T, H], all patterns timed turn by turn.

    Args:
        routings: by name, REFERENCE among them; each for T tokens.
    """
    count = experts.sizes.experts
    ranks = RANKS if count % RANKS == 0 else 1
    loads = {name: expert_load(routing, count) for name, routing in routings.items()}
    works = {}
    for name, routing in routings.items():
        works[name] = lambda routing=routing: grouped(x, experts, routing)
        if ranks > 1:
            here = count // ranks
            busiest, tokens, local = busiest_part(routing, count, ranks)
            rows, shard = x[tokens], experts.part(busiest * here, here)
            works[name, "rank"] = lambda rows=rows, shard=shard, local=local: grouped(rows, shard, local)
    if machine.device == "cuda":
        works = {name: graphed(work) for name, work in works.items()}
    seconds = {name: timing.median for name, timing in measure_together(works, machine.device, repeats=repeats).items()}
    rows = []
    for name, load in loads.items():
        row = {"pattern": name, "tokens": len(x), **load_balance(load), "ms": 1e3 * seconds[name]}
        row["cost_percent"] = 100 * (seconds[name] / seconds[REFERENCE] - 1)
        row["load"] = sorted(load.tolist(), reverse=True)
        if ranks > 1:
            by_rank = rank_load(load, ranks)
            row["rank_max_mean"] = float(by_rank.max() / by_rank.mean())
            row["rank_ms"] = 1e3 * seconds[name, "rank"]
            row["rank_cost_percent"] = 100 * (seconds[name, "rank"] / seconds[REFERENCE, "rank"] - 1)
        rows.append(row)
    return rows


def plot_patterns(path: str, rows: Sequence[dict]) -> None:
    """Load of the experts, busiest first, beside what each pattern costs."""
    figure, (left, right) = draw(2)
    most = max(row["tokens"] for row in rows)
    for row in rows:
        if row["tokens"] == most:
            mean = sum(row["load"]) / len(row["load"])
            left.step(
                range(1, len(row["load"]) + 1), [n / mean for n in row["load"]], where="mid", label=row["pattern"]
            )
    left.set(
        title=f"rows of each expert over their mean, {most:,} tokens", xlabel="expert, busiest first", ylim=(0, None)
    )
    left.legend()
    names = [name for name in dict.fromkeys(row["pattern"] for row in rows) if name != REFERENCE]
    bars = [(tokens, key, label) for tokens in sorted({r["tokens"] for r in rows}) for key, label in
            (("cost_percent", "one device"), ("rank_cost_percent", f"busiest of {RANKS} ranks"))]  # fmt: skip
    for i, (tokens, key, label) in enumerate(bars):
        by_name = {r["pattern"]: r.get(key) for r in rows if r["tokens"] == tokens}
        shown = [by_name.get(name) or 0.0 for name in names]
        right.bar([x + 0.2 * i for x in range(len(names))], shown, 0.19, label=f"{tokens:,} tokens, {label}")
    right.axhline(0, color="grey", linewidth=0.8)
    right.set(title="time over balanced routing, %")
    right.set_xticks([x + 0.3 for x in range(len(names))], names)
    right.legend()
    save_plot(figure, path)
