"""The picture of load_test.py: what becomes of a rising request rate."""

from collections.abc import Mapping, Sequence

from common.plots import COLOURS, draw, legend_below, save_plot
from common.results import Report
from common.standin import MODEL as STANDIN


def plot(path: str, rows: Sequence[Mapping], knee: float | None, results: Report) -> None:
    """Requests answered and good, and latencies, over the rate of the open loops. Rows: see `run_load`."""
    from matplotlib.ticker import LogFormatter

    figure, (requests, latency) = draw(2)
    rows = [row for row in rows if "rate" in row]
    offered = [row["rate"] for row in rows]
    requests.plot(offered, offered, color=COLOURS["limit"], linewidth=1, label="offered")
    requests.plot(offered, [row["answered"] for row in rows], "o-", color=COLOURS["baseline"], label="answered")
    if all("goodput" in row for row in rows):  # there is an objective
        requests.plot(offered, [row["goodput"] for row in rows], "o-", color=COLOURS["good"], label="good")
    for name, colour in (("ttft", COLOURS["baseline"]), ("tpot", COLOURS["variant"])):
        for quantile, style in ((50, "o--"), (99, "o-")):
            values = [row[f"{name}_p{quantile}_ms"] for row in rows]
            latency.plot(offered, values, style, color=colour, label=f"{name.upper()} P{quantile}")
        if limit := results.settings[f"slo_{name}_ms"]:
            latency.axhline(limit, color=colour, linestyle=":", label=f"{name.upper()} objective")
    if knee:
        requests.axvline(knee, color=COLOURS["quiet"], linestyle="--", label="knee")
        latency.axvline(knee, color=COLOURS["quiet"], linestyle="--")
    requests.set(title="throughput", xlabel="offered requests/s", ylabel="requests/s", ylim=(0, None))
    latency.set(title="latency", xlabel="offered requests/s", ylabel="ms", yscale="log")
    latency.yaxis.set_major_formatter(LogFormatter())
    latency.yaxis.set_minor_formatter(LogFormatter())
    legend_below(requests)
    legend_below(latency)
    model, simulated = results.settings["model"], results.settings["model"] == STANDIN
    model = "stand-in for a server" if simulated else model
    save_plot(figure, path, _message(offered, knee), model, results.machine, simulated)


def _message(offered: Sequence[float], knee: float | None) -> str:
    if knee is None:
        return "Requests answered, and latency, at the rates asked for"
    if not knee:
        return f"Too few requests meet the objective even at {min(offered):.1f} requests/s"
    above = [rate for rate in offered if rate > knee]
    beyond = f"; at {min(above):.1f} too few requests meet it" if above else ", the highest rate tried"
    return f"The objective is kept up to {knee:.1f} requests/s{beyond}"
