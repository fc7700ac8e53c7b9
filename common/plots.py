"""Plots without a display: one figure with axes side by side, written to a PNG."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(axes: int) -> tuple["Figure", list["Axes"]]:
    """A figure with `axes` plots in a row."""
    import matplotlib

    matplotlib.use("Agg")  # before pyplot: no window, no display needed
    import matplotlib.pyplot as plt

    figure, row = plt.subplots(1, axes, figsize=(5.5 * axes, 4.2), layout="constrained", squeeze=False)
    return figure, list(row[0])


def save_plot(figure: "Figure", path: str) -> None:
    """Write the figure and say so."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\nwritten: {path}")
