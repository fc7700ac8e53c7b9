"""Pictures of layouts: what the load showed, and what a dry run found room for."""

from collections.abc import Sequence

from common.plots import draw, save_plot


def plot_layouts(path: str, rows: Sequence[dict], slo_tpot_ms: float) -> None:
    """Throughput, time per token and time to first token over the requests at once, one line a layout."""
    figure, (tokens, tpot, ttft) = draw(3)
    for name in dict.fromkeys(row["layout"] for row in rows):
        line = [row for row in rows if row["layout"] == name]
        at_once = [row["at_once"] for row in line]
        tokens.plot(at_once, [row["tokens_per_s"] for row in line], "o-", label=name)
        tpot.plot(at_once, [row["tpot_p99_ms"] for row in line], "o-", label=name)
        ttft.plot(at_once, [row["ttft_p99_ms"] for row in line], "o-", label=name)
    tpot.axhline(slo_tpot_ms, color="gray", linestyle=":", label="objective")
    tokens.set(title="output tok/s")
    tpot.set(title="time per output token, P99, ms")
    ttft.set(title="time to first token, P99, ms")
    for axis in (tokens, tpot, ttft):
        axis.set(xlabel="requests at once", ylim=(0, None))
        axis.legend()
    save_plot(figure, path)


def plot_plan(path: str, rows: Sequence[dict]) -> None:
    """What fills the memory of one device in each layout, one plot a machine."""
    machines = list(dict.fromkeys(row["machine"] for row in rows))
    figure, axes = draw(len(machines))
    for axis, machine in zip(axes, machines, strict=True):
        shown = [row for row in rows if row["machine"] == machine]
        names, below = [row["layout"] for row in shown], [0.0] * len(shown)
        for key, label in (("weights_gib", "weights"), ("working_gib", "working memory"), ("cache_gib", "KV cache")):
            heights = [max(0.0, row[key]) for row in shown]
            axis.bar(names, heights, bottom=below, label=label)
            below = [low + height for low, height in zip(below, heights, strict=True)]
        axis.axhline(shown[0]["memory_gib"], color="black", linewidth=0.8, label="the device")
        axis.set(title=f"{machine}: GiB a device", ylim=(0, 1.35 * max(*below, shown[0]["memory_gib"])))
        axis.legend(loc="upper center", ncols=2)
    save_plot(figure, path)
