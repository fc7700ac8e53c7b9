"""The picture of inference_serving.py: throughput and time per token over concurrency."""

from collections.abc import Mapping, Sequence

from common import targets
from common.gpu import DTYPE_NAMES, Machine
from common.plots import COLOURS, draw, legend_below, save_plot


def plot(path: str, rows: Sequence[Mapping], best: Mapping, model: str, machine: Machine) -> None:
    """One line per precision; the targets S2 and S3 are drawn in. Rows: those of the table "load"."""
    figure, (left, right) = draw(2)
    for precision in dict.fromkeys(row["precision"] for row in rows):
        line = [row for row in rows if row["precision"] == precision]
        concurrency = [row["concurrency"] for row in line]
        colour = COLOURS["baseline" if precision in DTYPE_NAMES.values() else "variant"]
        left.plot(concurrency, [row["tokens_per_s"] for row in line], "o-", color=colour, label=precision)
        for quantile, style in ((50, "o--"), (99, "o-")):
            tpot = [row[f"tpot_p{quantile}_ms"] for row in line]
            right.plot(concurrency, tpot, style, color=colour, label=f"{precision} P{quantile}")
    for quantile, target, style in ((50, targets.TPOT_P50_MS, "--"), (99, targets.TPOT_P99_MS, "-")):
        right.axhline(target, color=COLOURS["limit"], linestyle=style, linewidth=1, label=f"target P{quantile}")
    for axis in (left, right):
        axis.axvline(best["concurrency"], color=COLOURS["quiet"], linestyle=":", label="best")
    left.set(title="throughput", xlabel="requests at once", ylabel="output tokens/s", ylim=(0, None))
    right.set(title="time per output token (TPOT)", xlabel="requests at once", ylabel="ms", ylim=(0, None))
    legend_below(left, 3)
    legend_below(right, 3)
    kept, at_once = "within" if best["best"] == targets.BEST else "outside", best["concurrency"]
    speed = f"{best['tokens_per_s']:,.0f} output tok/s at {at_once} requests at once"
    message = f"{best['precision']}: {speed}, {kept} the targets"
    save_plot(figure, path, message=message, model=model, machine=machine)
