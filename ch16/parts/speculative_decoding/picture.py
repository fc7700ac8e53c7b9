"""The picture of speculation: speed-up over batch size, and over the length of the draft."""

from collections.abc import Sequence

from common.gpu import Machine
from common.plots import COLOURS, draw, legend_below, save_plot

TEXT_COLOURS = {"copying": COLOURS["variant"], "free": COLOURS["second"]}
DRAFT_LINES = {"n-gram": "o-", "smaller model": "s--", "EAGLE": "^:"}


def plot(path: str, batches: Sequence[dict], gammas: Sequence[dict], model: str, machine: Machine) -> None:
    """vLLM's speed-up by batch, one line for each draft and text; the loop's by gamma, predicted and measured."""
    figure, (left, right) = draw(2)
    for draft, text in dict.fromkeys((row["how"], row["text"]) for row in batches):
        rows = [row for row in batches if (row["how"], row["text"]) == (draft, text)]
        at, ratios = [row["batch"] for row in rows], [row["speedup"] for row in rows]
        left.plot(at, ratios, DRAFT_LINES[draft], ms=9, color=TEXT_COLOURS[text], label=f"{draft}, {text} text")
    left.set(title="vLLM", xlabel="requests decoded together")
    at = [row["gamma"] for row in gammas]
    if all("predicted" in row for row in gammas):  # something was drafted
        predicted = [row["predicted"] for row in gammas]
        right.plot(at, predicted, "o--", ms=9, color=COLOURS["quiet"], label="predicted from alpha")
    right.plot(at, [row["speedup"] for row in gammas], "o-", ms=9, color=COLOURS["variant"], label="measured")
    right.set(title="our loop, n-gram, copying text, one request", xlabel="drafted tokens per pass (gamma)")
    for axis, ticks in ((left, sorted({row["batch"] for row in batches})), (right, at)):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
        axis.axhline(1, color=COLOURS["baseline"], linestyle=":", label="plain decoding")
        axis.set(ylim=(0, None), ylabel="speed-up over plain decoding")
        legend_below(axis)
    alone = {row["text"]: row["speedup"] for row in batches if (row["how"], row["batch"]) == ("n-gram", 1)}
    message = (
        f"With n-gram drafts vLLM decodes one request {alone['copying']:.2f}x as fast where the answer copies the "
        f"prompt, and {alone['free']:.2f}x as fast on free text"
    )
    save_plot(figure, path, message, model, machine)
