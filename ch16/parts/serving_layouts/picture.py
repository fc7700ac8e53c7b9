"""Pictures of layouts: what the loads showed, and the memory of a dry run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from common.gpu import Machine
from common.plots import COLOURS, draw, legend_below, save_plot
from common.results import Report
from common.targets import BEST

LINES = ("baseline", "variant", "second", "third", "fourth", "fifth")
PARTS = (  # of a GPU's memory, from below
    ("weights_gib", "weights", "baseline"),
    ("working_gib", "working memory", "quiet"),
    ("cache_gib", "KV cache", "variant"),
)


def plot_layouts(path: str, rows: Sequence[Mapping], best: Mapping, results: Report, simulated: bool) -> None:
    """Throughput and TPOT P99 over the requests at once, one line per layout. Rows: those of the table "layouts"."""
    figure, (tokens, tpot) = draw(2)
    for number, name in enumerate(dict.fromkeys(row["layout"] for row in rows)):
        line = [row for row in rows if row["layout"] == name]
        at_once, colour = [row["at_once"] for row in line], COLOURS[LINES[number % len(LINES)]]
        tokens.plot(at_once, [row["tokens_per_s"] for row in line], "o-", color=colour, label=name)
        tpot.plot(at_once, [row["tpot_p99_ms"] for row in line], "o-", color=colour, label=name)
    tpot.axhline(results.settings["tpot_ms"], color=COLOURS["limit"], linestyle=":", label="objective")
    tokens.set(title="throughput", xlabel="requests at once", ylabel="output tokens/s", ylim=(0, None))
    tpot.set(title="time per output token (TPOT), P99", xlabel="requests at once", ylabel="ms", ylim=(0, None))
    legend_below(tokens, 3)
    legend_below(tpot, 3)
    what = "Fastest within the objective" if best["best"] == BEST else "No layout keeps the objective"
    speed = f"{best['tokens_per_s']:,.0f} output tok/s at TPOT P99 {best['tpot_p99_ms']:.0f} ms"
    model = results.settings["model"].removesuffix(" (simulated)")
    save_plot(figure, path, f"{what}: {best['layout']}, {speed}", model, results.machine, simulated)


def plot_plan(path: str, rows: Sequence[Mapping], model: str, machines: Sequence[Machine]) -> None:
    """What fills the memory of one GPU in each layout, one plot per machine. Rows: those of the table "plan"."""
    figure, axes = draw(len(machines))
    for axis, machine in zip(axes, machines, strict=True):
        planned = [row for row in rows if row["machine"] == machine.title]
        names, below = [row["layout"] for row in planned], [0.0] * len(planned)
        for key, label, colour in PARTS:
            heights = [max(0.0, row[key]) for row in planned]
            axis.bar(names, heights, bottom=below, label=label, color=COLOURS[colour])
            below = [low + height for low, height in zip(below, heights, strict=True)]
        axis.axhline(planned[0]["memory_gib"], color=COLOURS["limit"], linewidth=1, label="memory of the GPU")
        axis.set(title=machine.title, xlabel="replicas x GPUs per replica", ylabel="GiB per GPU")
        legend_below(axis)
    hosts = " and ".join(machine.title for machine in machines)
    everywhere = replace(machines[0], name=hosts.split(" x ", 1)[1])
    save_plot(figure, path, message="Memory per GPU in each layout (computed)", model=model, machine=everywhere)
