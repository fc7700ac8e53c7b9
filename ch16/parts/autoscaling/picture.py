"""The picture: what misses cost with each signal, fleets at work, signals under overload."""

from collections.abc import Mapping, Sequence

import numpy as np

from common.plots import draw, save_plot


def plot(
    path: str,
    frontier: Sequence[Mapping],
    chosen: Sequence[Mapping],
    fleets: Mapping[str, np.ndarray],
    load: np.ndarray,
    seen: Sequence[Mapping],
    loads: Sequence[float],
) -> None:
    """Three plots.

    Args:
        frontier: a row for each target tried: signal, hours, missed_percent; `chosen`: the rows of those found.
        fleets: replicas by hour [turns, 2] by name, and `load` [.., 2] in replicas, both over hours.
        seen: a row for each signal, with its value at each of `loads`, as "x<load>".
    """
    figure, (costs, times, values) = draw(3)
    colors = {row["signal"]: f"C{i}" for i, row in enumerate(seen)}
    for signal, color in colors.items():
        points = sorted((row["hours"], row["missed_percent"]) for row in frontier if row["signal"] == signal)
        costs.plot(*zip(*points, strict=True), ".-", label=signal, linewidth=1, color=color)
    for row in chosen:
        costs.plot(row["hours"], row["missed_percent"], "o", color=colors[row["signal"]], markeredgecolor="black")
    costs.set(title="simulated, bursty: every target", xlabel="replica-hours", ylabel="SLO misses, %")
    costs.legend()
    times.fill_between(*load.T, color="lightgrey", label="load, in busy replicas")
    for signal, fleet in fleets.items():
        times.step(*fleet.T, where="post", label=signal, color=colors[signal])
    times.set(title="simulated, bursty: the fleets", xlabel="hours", ylabel="replicas", xlim=(0, 3), ylim=(0, 14))
    times.legend(loc="upper left")
    for row in seen:
        over_1x = [row[f"x{times_:g}"] / row["x1"] if row["x1"] else np.nan for times_ in loads]
        values.plot(loads, over_1x, "o-", label=row["signal"], color=colors[row["signal"]])
    values.set(
        title="simulated: what a signal sees", xlabel="load over capacity", ylabel="value over that at 1x", yscale="log"
    )
    values.legend()
    save_plot(figure, path)
