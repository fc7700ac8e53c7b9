"""The picture of FP8: what a scale saves, beside the speed-up of products or, without FP8 units, the perplexity."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from common.fp8 import SCALINGS
from common.gpu import Machine
from common.plots import COLOURS, draw, legend_below, save_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(path: str, tables: Mapping[str, Sequence[dict]], model: str, machine: Machine) -> None:
    """`tables`: rows of the script's tables, by their names in the JSON."""
    figure, (left, right) = draw(2)
    _scaling(left, tables["scaling"])
    message = f"FP8 weights: {max(row['weight_ratio'] for row in tables['memory']):.2f} of the bytes; "
    if gemms := [row for row in tables.get("gemm", ()) if row["layer"] == "mlp_fc1"]:
        _products(right, gemms, [row["recipe"] for row in tables["memory"]])
        message += f"products run up to {max(row['speedup'] for row in gemms):.2f}x as fast"
    else:
        readings, best = tables["accuracy"][1:], tables["accuracy"][-1]
        _perplexity(right, [row for row in readings if row["tokens"] == readings[0]["tokens"]])
        change = 100 * (best["perplexity_ratio"] - 1)
        message += f"perplexity {'rises' if change > 0 else 'falls'} by {abs(change):.1f}% ({best['recipe']})"
    save_plot(figure, path, message, model, machine)


def _scaling(axis: "Axes", errors: Sequence[dict]) -> None:
    rows = {row["scaling"]: row for row in errors if (row["tensor"], row["format"]) == ("input", "E4M3")}
    bars = (("error_percent", "relative error", "variant"), ("zeroed_percent", "values rounded to zero", "second"))
    for i, (key, label, colour) in enumerate(bars):
        heights = [rows[scaling][key] for scaling in SCALINGS]
        drawn = axis.bar([x + 0.4 * i for x in range(len(SCALINGS))], heights, 0.38, label=label, color=COLOURS[colour])
        axis.bar_label(drawn, [f"{height:.{1 if height > 1 else 2}f}" for height in heights])
    axis.set(title="Inputs of the layer with the largest outliers, in E4M3", xlabel="one scale per")
    axis.set(ylabel="% (logarithmic)", yscale="log")
    axis.margins(y=0.1)
    axis.set_xticks([x + 0.2 for x in range(len(SCALINGS))], SCALINGS)
    legend_below(axis)


def _products(axis: "Axes", rows: Sequence[dict], recipes: Sequence[str]) -> None:
    tokens = [row["tokens"] for row in rows]
    colours = dict(zip(recipes, ("variant", "second", "third"), strict=False)) | {"limit": "limit"}
    for name, colour in colours.items():
        style = "--" if name == "limit" else "o-"
        axis.plot(tokens, [row[name] / row["BF16"] for row in rows], style, color=COLOURS[colour], label=name)
    eager = [row["eager_speedup"] for row in rows]
    axis.plot(tokens, eager, "x:", color=COLOURS["quiet"], label=f"{recipes[0]}, eager")
    axis.axhline(1, color=COLOURS["baseline"], label="BF16")
    axis.set(title="Product of mlp_fc1, CUDA graphs", xlabel="tokens", ylabel="speed-up over BF16")
    axis.set(xscale="log", ylim=(0, None))
    legend_below(axis, 3)


def _perplexity(axis: "Axes", rows: Sequence[dict]) -> None:
    above = [100 * (row["perplexity_ratio"] - 1) for row in rows]
    axis.barh([row["recipe"] for row in rows], above, color=COLOURS["variant"])
    axis.invert_yaxis()
    axis.set(title=f"Perplexity above BF16, first {rows[0]['tokens']:,} tokens", xlabel="%", ylabel="recipe")
