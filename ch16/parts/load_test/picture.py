"""The picture of a load test: latency over throughput, and what was good of what was offered."""

from collections.abc import Sequence

from common.plots import draw, save_plot


def plot(path: str, rows: Sequence[dict], knee: float) -> None:
    """Percentiles of TTFT and TPOT over the tokens/s answered, and goodput over the rate, with the knee."""
    figure, axes = draw(3)
    throughput = [row["tokens_per_s"] for row in rows]
    for axis, figure_name, title in zip(
        axes, ("ttft", "tpot"), ("time to first token", "time per token"), strict=False
    ):
        for quantile, style in ((50, "-o"), (90, "--o"), (99, ":o")):
            axis.plot(throughput, [row[f"{figure_name}_p{quantile}_ms"] for row in rows], style, label=f"P{quantile}")
        axis.set(title=title, xlabel="output tok/s", ylabel="ms", yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3)
        axis.legend()
    offered = [row["rate"] for row in rows]
    axes[2].plot(offered, offered, color="gray", linewidth=1, label="offered")
    axes[2].plot(offered, [row["answered"] for row in rows], "-o", label="answered")
    if all("goodput" in row for row in rows):  # there is an objective
        axes[2].plot(offered, [row["goodput"] for row in rows], "-o", label="goodput")
    if knee:
        axes[2].axvline(knee, color="tab:red", linestyle="--", label="knee")
    axes[2].set(title="requests/s", xlabel="offered, requests/s", ylabel="requests/s")
    axes[2].grid(alpha=0.3)
    axes[2].legend()
    save_plot(figure, path)
