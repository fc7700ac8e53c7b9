"""The picture: slots over time under both policies, and what a larger batch costs and gives."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from ch16.parts.continuous_batching.tables import knee_of, span
from common.gpu import Machine
from common.load import Timeline
from common.plots import COLOURS, draw, legend_below, save_plot

BATCHES_SHOWN = 8  # of fixed batches: further ones look the same and would be too narrow


def plot(
    path: str, timelines: Mapping[str, Timeline], decode: Sequence[Mapping], slots: int, model: str, machine: Machine
) -> None:
    """Draw the median run of each policy, fixed batches first, and the rows of DECODE_COLUMNS."""
    from matplotlib.ticker import LogLocator, MultipleLocator, NullLocator

    figure, (running, sizes) = draw(2)
    shown_s, means = 0.0, []
    for (name, timeline), colour in zip(timelines.items(), ("baseline", "variant"), strict=True):
        start, batches = min(timeline.sent.values()), len(timeline.sent) / slots
        seconds, counts = zip(*((step.ended - start, step.requests) for step in timeline.steps), strict=True)
        shown_s = max(shown_s, seconds[-1] * min(1, BATCHES_SHOWN / batches))
        means.append(fmean(counts))
        running.step(seconds, counts, where="pre", lw=1.5, color=COLOURS[colour], label=name)
    running.set(title="requests running", xlabel="seconds", ylabel="requests")
    running.set(ylim=(0, 1.05 * slots), xlim=(0, shown_s))
    running.yaxis.set_major_locator(MultipleLocator(max(1, slots // 8)))
    legend_below(running)

    ms, rates = [row["ms"] for row in decode], [row["tokens_per_s"] for row in decode]
    knee = [i for i, row in enumerate(decode) if row["mark"]]
    sizes.plot(ms, rates, "o-", ms=9, color=COLOURS["quiet"], label="batch size")
    sizes.plot(ms, rates, "o", ms=12, color=COLOURS["variant"], label="knee", markevery=knee)
    for row in decode:
        sizes.annotate(f"{row['batch']}", (row["ms"], row["tokens_per_s"]), xytext=(9, -17), textcoords="offset points")
    sizes.set(title="decode by batch size", xlabel="ms per token", ylabel="output tok/s", xlim=(0, 1.1 * max(ms)))
    sizes.set(yscale="log", ylim=(0.7 * min(rates), 1.3 * max(rates)))
    sizes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    sizes.yaxis.set_minor_locator(NullLocator())
    sizes.yaxis.set_major_formatter("{x:,g}")
    legend_below(sizes)
    at = span(*(row["batch"] for row in knee_of(decode)))
    message = (
        f"Continuous batching keeps {means[1]:.1f} of {slots} slots busy, fixed batches {means[0]:.1f}; "
        f"decode gives the most throughput per latency at batch {at}"
    )
    save_plot(figure, path, message, model, machine)
