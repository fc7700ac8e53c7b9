"""What uneven routing costs, on one device and for the busiest of several ranks."""

from collections.abc import Mapping, Sequence

import torch

from ch16.parts.moe_benchmark.experts import Experts, Routing, grouped
from ch16.parts.moe_benchmark.parallel import busiest_part
from ch16.parts.moe_benchmark.presets import Preset
from ch16.parts.moe_benchmark.routing import (
    CAPACITY_FACTOR,
    PATTERNS,
    expert_load,
    load_balance,
    make_routing,
    rank_load,
)
from common.device import torch_dtype
from common.gpu import Machine
from common.plots import draw, save_plot
from common.results import Column
from common.timing import Timing, graphed, measure_together, relative_spread

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
    Column("spread_percent", "its spread %", ".1f"),
    Column("rank_max_mean", f"busiest of {RANKS} ranks: rows / mean", ".2f"),
    Column("rank_ms", "its ms (emulated)", ".3f"),
    Column("rank_cost_percent", "its time over balanced %", "+.1f"),
    Column("rank_spread_percent", "spread of that %", ".1f"),
)


def measure_routing(
    preset: Preset, trained: Sequence[Routing], machine: Machine, tokens: Sequence[int], repeats: int, seed: int
) -> list[dict]:
    """Rows of PATTERN_COLUMNS for a preset's layer: simulated patterns, the evenest trained layer, the most uneven.

    Args:
        trained: of each layer of a trained model with as many experts, for the most tokens; or none.
        tokens: of the layer's input, one set of rows each.
    """
    experts, rows = Experts.random(preset.sizes, machine.device, torch_dtype(machine)), []
    ordered = sorted(trained, key=lambda routing: int(expert_load(routing, preset.experts).max()))
    for count in tokens:
        routings = {
            name: make_routing(name, count, preset.experts, preset.top_k, seed, machine.device) for name in PATTERNS
        }
        if ordered:
            named = {"trained, evenest layer": ordered[0], "trained, most uneven": ordered[-1]}
            routings |= {name: Routing(r.experts[:count], r.weights[:count]) for name, r in named.items()}
        x = torch.randn(count, preset.hidden, device=machine.device, dtype=experts.w_in.dtype)
        rows += measure_patterns(routings, x, experts, machine, repeats)
    return rows


@torch.no_grad()
def measure_patterns(
    routings: Mapping[str, Routing], x: torch.Tensor, experts: Experts, machine: Machine, repeats: int
) -> list[dict]:
    """Rows of PATTERN_COLUMNS for tokens x [T, H], all patterns timed turn by turn.

    A cost is of the medians, in percent; its spread is the interquartile range of the turns' own ratios to balanced
    routing, over their median, in percent, too.

    Args:
        routings: by name, REFERENCE among them; each for T tokens.
        repeats: turns.
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
    took, rows = measure_together(works, machine.device, repeats=repeats), []
    for name, load in loads.items():
        row = {"pattern": name, "tokens": len(x), **load_balance(load), "ms": 1e3 * took[name].median}
        row |= _over(took[name], took[REFERENCE], "")
        row["load"] = sorted(load.tolist(), reverse=True)
        if ranks > 1:
            by_rank = rank_load(load, ranks)
            row["rank_max_mean"] = float(by_rank.max() / by_rank.mean())
            row["rank_ms"] = 1e3 * took[name, "rank"].median
            row |= _over(took[name, "rank"], took[REFERENCE, "rank"], "rank_")
        rows.append(row)
    return rows


def _over(timing: Timing, reference: Timing, prefix: str) -> dict[str, float]:
    """What a pattern costs over the reference, and how much that differs from turn to turn."""
    ratios = [one / other for one, other in zip(timing.seconds, reference.seconds, strict=True)]
    cost = 100 * (timing.median / reference.median - 1)
    return {f"{prefix}cost_percent": cost, f"{prefix}spread_percent": 100 * relative_spread(ratios)}


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
    bars = [
        (tokens, key, label)
        for tokens in sorted({r["tokens"] for r in rows})
        for key, label in (("cost_percent", "one device"), ("rank_cost_percent", f"busiest of {RANKS} ranks"))
    ]
    for i, (tokens, key, label) in enumerate(bars):
        by_name = {r["pattern"]: r.get(key) for r in rows if r["tokens"] == tokens}
        shown = [by_name.get(name) or 0.0 for name in names]
        right.bar([x + 0.2 * i for x in range(len(names))], shown, 0.19, label=f"{tokens:,} tokens, {label}")
    right.axhline(0, color="grey", linewidth=0.8)
    right.set(title="time over balanced routing, %")
    right.margins(y=0.35)  # room for the legend
    right.set_xticks([x + 0.3 for x in range(len(names))], names)
    right.legend()
    save_plot(figure, path)
