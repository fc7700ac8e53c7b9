"""The picture: what signals read under overload, and what their targets cost."""

from collections.abc import Mapping

import numpy as np

from ch16.parts.autoscaling.signals import signals
from ch16.parts.autoscaling.tables import LOADS
from common.plots import COLOURS, draw, legend_below, save_plot
from common.results import Report

BY_SIGNAL = {"gpu": "baseline", "active": "variant", "queue": "second", "larger": "third", "kv": "fourth"}


def message(ratios: Mapping[str, float | None]) -> str:
    """What the picture shows, from each signal's value at 5x over that at 1x."""
    if not {"gpu", "active"} <= set(ratios):
        return "What each signal reads under overload, and what scaling on it costs"
    gpu, active = ratios["gpu"], ratios["active"]
    return f"At 5x the capacity GPU utilization reads {gpu:.2f}x its value at 1x, requests in flight {active:,.0f}x"


def plot(path: str, results: Report) -> None:
    """Left: each signal over the load. Right: misses over replica-hours for all targets."""
    seen, frontier, found = (results.tables[name]["rows"] for name in ("seen", "frontier", "bursty"))
    names = {signal.title: name for name, signal in signals(1).items()}
    figure, (values, costs) = draw(2)
    for row, best in zip(seen, found, strict=True):
        title = row["signal"]
        colour = COLOURS[BY_SIGNAL[names[title]]]
        over_1x = [row[f"x{load:g}"] / row["x1"] if row["x1"] else np.nan for load in LOADS]
        values.plot(LOADS, over_1x, "o-", label=title, color=colour)
        tried = [(point["hours"], point["missed_percent"]) for point in frontier if point["signal"] == title]
        costs.plot(*zip(*tried, strict=True), "o", color=colour, alpha=0.5)
        costs.plot(best["hours"], best["missed_percent"], "o", markersize=12, color=colour, markeredgecolor="black")
    costs.plot([], [], "o", color=COLOURS["quiet"], label="target tried")
    costs.plot([], [], "o", markersize=12, color="white", markeredgecolor="black", label="best on other bursts")
    values.set(title="what two replicas report", xlabel="load over capacity", ylabel="signal, x its value at 1x")
    values.set_yscale("log")
    values.yaxis.set_major_formatter("{x:g}")
    costs.set(title="scaling on it, all targets", xlabel="replica-hours", ylabel="requests over the TTFT objective, %")
    legend_below(values, 2)
    legend_below(costs, 2)
    sentence = message({names[row["signal"]]: row["ratio"] for row in seen})
    model = results.tables["costs"]["rows"][0]["source"]
    save_plot(figure, path, message=sentence, model=model, machine=results.machine, simulated=True)
