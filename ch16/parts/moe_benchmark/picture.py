"""The pictures of the MoE benchmark."""

from collections.abc import Sequence

from ch16.parts.moe_benchmark.routing import RANKS, REFERENCE
from common.gpu import Machine
from common.plots import COLOURS, draw, legend_below, save_plot

PATTERN_COLOURS = {
    "balanced": COLOURS["baseline"],
    "uniform": COLOURS["second"],
    "zipf": COLOURS["variant"],
    "hot": COLOURS["fourth"],
    "trained, evenest": COLOURS["third"],
    "trained, most uneven": COLOURS["fifth"],
}
PART_COLOURS = {
    "compute": COLOURS["baseline"],
    "imbalance": COLOURS["variant"],
    "exchange": COLOURS["second"],
    "rest": COLOURS["quiet"],
}


def plot_patterns(path: str, rows: Sequence[dict], layer: str, machine: Machine) -> None:
    """The load of the experts, busiest first, beside the cost of each pattern, both for the most tokens."""
    figure, (load, cost) = draw(2)
    tokens = max(row["tokens"] for row in rows)
    rows = [row for row in rows if row["tokens"] == tokens]
    for row in rows:
        mean, experts = sum(row["load"]) / len(row["load"]), range(1, len(row["load"]) + 1)
        colour = PATTERN_COLOURS[row["pattern"]]
        load.step(experts, [n / mean for n in row["load"]], where="mid", color=colour, label=row["pattern"])
    load.set(title=f"Load of the experts, {tokens:,} tokens", xlabel="expert, busiest first")
    load.set(ylabel="rows over their mean", ylim=(0, None))
    legend_below(load)
    shown = [row for row in rows if row["pattern"] != REFERENCE]
    places = (("cost_percent", "one device", "baseline"), ("rank_cost_percent", f"busiest of {RANKS} ranks", "variant"))
    for shift, (key, label, colour) in zip((-0.2, 0.2), places, strict=True):
        costs = [row.get(key, 0.0) for row in shown]
        cost.bar([x + shift for x in range(len(shown))], costs, 0.38, color=COLOURS[colour], label=label)
    cost.axhline(0, color=COLOURS["limit"], linewidth=1)
    cost.set(title=f"Cost over balanced routing, {tokens:,} tokens", ylabel="extra time, %")
    cost.set_xticks(range(len(shown)), [row["pattern"].replace("most ", "").replace(" ", "\n") for row in shown])
    legend_below(cost)
    most = max(row[key] for row in shown for key, _, _ in places if key in row)
    effect = f"costs a layer up to {most:.0f}% more time" if most > 0 else "costs no time here"
    message = f"Up to {max(row['max_mean'] for row in shown):.1f}x the mean load on the busiest expert {effect}"
    save_plot(figure, path, message, layer, machine, simulated=True)


def plot_ranks(path: str, rows: Sequence[dict], layer: str, machine: Machine) -> None:
    """Where the time of a layer goes: a bar per routing, one plot per number of tokens (the fewest and the most)."""
    counts = sorted({row["tokens"] for row in rows})
    shown = list(dict.fromkeys((counts[0], counts[-1])))
    figure, axes = draw(len(shown))
    for axis, tokens in zip(axes, shown, strict=True):
        bars = [row for row in rows if row["tokens"] == tokens]
        names, below = [row["pattern"] for row in bars], [0.0] * len(bars)
        for part, colour in PART_COLOURS.items():
            heights = [max(0.0, row[f"{part}_ms"]) for row in bars]  # the rest is a difference, noise may make it < 0
            axis.bar(names, heights, bottom=below, color=colour, label=part)
            below = [low + height for low, height in zip(below, heights, strict=True)]
        layers = [row["step_ms"] for row in bars]
        axis.plot(names, layers, "_", color=COLOURS["limit"], markersize=36, label="layer, measured whole")
        axis.set(title=f"{tokens:,} tokens per rank", ylabel="ms per layer", xlabel="routing")
        legend_below(axis, 3)
    most = max(rows, key=lambda row: row["imbalance_ms"] / row["step_ms"])
    share = f"{100 * most['imbalance_ms'] / most['step_ms']:.0f}% of a layer's time ({most['pattern']} routing)"
    message = f"Waiting for the busiest rank takes up to {share}"
    save_plot(figure, path, message, layer, machine, simulated=True)
