"""The picture of the live runs."""

from collections.abc import Sequence

from ch16.scheduling.mix import CLASSES
from common.plots import draw, save_plot


def plot(path: str, points: Sequence[dict]) -> None:
    """Time to first token of each live request over its arrival, one plot a policy."""
    names = list(dict.fromkeys(point["policy"] for point in points))
    figure, axes = draw(len(names))
    top = max(point["ttft_s"] for point in points)
    for axis, name in zip(axes, names, strict=True):
        for kind in CLASSES:
            shown = [point for point in points if point["policy"] == name and point["kind"] == kind]
            axis.plot([p["arrival_s"] for p in shown], [p["ttft_s"] for p in shown], "o", markersize=3, label=kind)
        axis.set(title=name, xlabel="arrival, s", ylabel="time to first token, s", ylim=(0, 1.05 * top))
        axis.legend(title="priority")
    save_plot(figure, path)
