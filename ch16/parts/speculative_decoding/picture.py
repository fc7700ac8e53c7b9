"""The picture of speculation: speed-up over batch size, and over the length of the draft."""

from collections.abc import Sequence

from common.plots import draw, save_plot


def plot(path: str, batches: Sequence[dict], gammas: Sequence[dict]) -> None:
    """vLLM's speed-up by batch, one line for each draft and text; the loop's by gamma, predicted and measured."""
    figure, (left, right) = draw(2)
    for draft, text in dict.fromkeys((row["how"], row["text"]) for row in batches):
        rows = [row for row in batches if (row["how"], row["text"]) == (draft, text)]
        left.plot([row["batch"] for row in rows], [row["speedup"] for row in rows], "o-", label=f"{draft}, {text}")
    left.set_xscale("log", base=2)
    left.set(title="vLLM", xlabel="requests decoded together", ylabel="speed-up over plain decoding")
    at = [row["gamma"] for row in gammas]
    if all("predicted" in row for row in gammas):  # something was drafted
        right.plot(at, [row["predicted"] for row in gammas], "o--", label="predicted")
    right.plot(at, [row["speedup"] for row in gammas], "o-", label="measured")
    right.set_xscale("log", base=2)
    right.set(title="our loop, n-gram, copying", xlabel="drafted tokens (gamma)")
    for axes, ticks in ((left, sorted({row["batch"] for row in batches})), (right, at)):
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.axhline(1, color="grey", linestyle=":")
        axes.set(ylim=(0, None))
        axes.legend()
    save_plot(figure, path)
