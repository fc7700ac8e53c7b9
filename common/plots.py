"""Pictures for a slide, written to PNG without a display: at most two plots side by side, 14 points, one title.

Colours mean the same in all pictures, see COLOURS.
"""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from common.gpu import Machine

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 14  # of the smallest letters, on a slide 13.3 inches wide
SLIDE_INCHES = (13.3, 6.6)
# By meaning; blue and orange are told apart by everybody, and in print (Okabe and Ito's palette).
COLOURS = {
    "baseline": "#0072B2",  # what was there before: BF16, plain decoding, fixed batches, first come first served
    "variant": "#D55E00",  # what the lesson is about: FP8, speculation, continuous batches, priorities
    "second": "#009E73",  # further variants
    "third": "#CC79A7",
    "fourth": "#E69F00",
    "fifth": "#56B4E9",
    "high": "#D55E00",  # classes of requests
    "normal": "#0072B2",
    "low": "#009E73",
    "good": "#009E73",  # what became of requests
    "bad": "#D55E00",
    "limit": "#000000",  # physical limits, and targets
    "quiet": "#999999",
}


def draw(axes: int = 2) -> tuple["Figure", list["Axes"]]:
    """A figure of a slide's size with one plot, or two side by side.

    Raises:
        ValueError: more than two: a picture has one message.
    """
    if axes not in (1, 2):
        raise ValueError(f"a picture has one or two plots, not {axes}")
    import matplotlib

    matplotlib.use("Agg")  # before pyplot: no window, no display needed
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": POINTS, "axes.titlesize": POINTS + 1, "lines.linewidth": 2})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True})
    figure, row = plt.subplots(1, axes, figsize=SLIDE_INCHES, layout="constrained", squeeze=False)
    return figure, list(row[0])


def legend_below(axis: "Axes", columns: int = 2, **options: object) -> None:
    """A legend under the plot, where it hides no data."""
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, frameon=False, **options)


def save_plot(figure: "Figure", path: str, message: str, model: str, machine: Machine, simulated: bool = False) -> None:
    """Title the figure, write it, and say so.

    Args:
        message: what the picture shows, as a sentence.
        model: that was measured.
        simulated: whether anything in it is.

    Raises:
        ValueError: letters smaller than POINTS, which a class cannot read.
    """
    from matplotlib.text import Text

    if small := {t.get_text() for t in figure.findobj(Text) if t.get_text() and t.get_fontsize() < POINTS}:
        raise ValueError(f"letters of less than {POINTS} points: {', '.join(sorted(small))}")
    where = f"{model}, {machine.title}{'; simulated' if simulated else ''}"
    figure.suptitle(textwrap.fill(message, 90) + "\n" + where, fontsize=POINTS + 4)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\nwritten: {path}")
