"""The picture of the lab: every live request, and the simulated waits by class."""

from collections.abc import Sequence

from ch16.parts.request_scheduler.mix import CLASSES
from common.plots import draw, save_plot


def plot(path: str, points: Sequence[dict], simulated: Sequence[dict]) -> None:
    """Time to first token of each live request over its arrival, one plot a policy; then P99 of the simulation.

    Args:
        path: of the PNG.
        points: `policy`, `kind`, `arrival_s` and `ttft_s` of each.
        simulated: rows of WAIT_COLUMNS; a policy may have none for a class without requests.
    """
    names = list(dict.fromkeys(point["policy"] for point in points))
    figure, axes = draw(len(names) + 1)
    top = max(point["ttft_s"] for point in points)
    for axis, name in zip(axes, names, strict=False):
        for kind in CLASSES:
            shown = [point for point in points if point["policy"] == name and point["kind"] == kind]
            axis.plot([p["arrival_s"] for p in shown], [p["ttft_s"] for p in shown], "o", markersize=3, label=kind)
        axis.set(title=name, xlabel="arrival, s", ylabel="time to first token, s", ylim=(0, 1.05 * top))
        axis.legend(title="priority")
    policies = list(dict.fromkeys(row["policy"] for row in simulated))
    for i, kind in enumerate(CLASSES):
        shown = [row for row in simulated if row["group"].endswith(kind)]
        places = [policies.index(row["policy"]) + (i - 1) / 5 for row in shown]
        axes[-1].plot([row["p99_s"] for row in shown], places, "o", label=kind)
    axes[-1].set(title="simulated", xlabel="time to first token, P99, s", xscale="log")
    axes[-1].set_yticks(range(len(policies)), policies)
    axes[-1].invert_yaxis()
    axes[-1].grid(axis="x", alpha=0.3)
    axes[-1].legend(title="priority", loc="lower left")
    save_plot(figure, path)
