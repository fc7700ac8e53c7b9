"""The picture of the lab: what became of the requests over time, one plot a path."""

import collections
import math
from collections.abc import Mapping, Sequence

from ch16.parts.load_balancer.client import Answer
from ch16.parts.load_balancer.lab import Fault
from common.plots import draw, save_plot

COLORS = {
    "answered": "tab:green",
    "retried": "tab:blue",
    "cut off, told": "tab:orange",
    "cut off, not told": "tab:purple",
    "lost": "tab:red",
    "duplicated": "black",
}


def plot(path: str, answers: Mapping[str, Sequence[Answer]], faults: Sequence[Fault]) -> None:
    """Requests by the time they were sent, stacked by outcome, with the faults as lines."""
    figure, axes = draw(len(answers))
    start = min(answer.sent for seen in answers.values() for answer in seen)
    length = max(answer.sent for seen in answers.values() for answer in seen) - start
    width = 0.5 if length < 30 else math.ceil(length / 60)  # whole seconds: each holds as many requests as the next
    for axis, (name, seen) in zip(axes, answers.items(), strict=True):
        bottom: collections.Counter[int] = collections.Counter()
        for outcome, color in COLORS.items():
            counts = collections.Counter(int((a.sent - start) / width) for a in seen if shown(a) == outcome)
            if counts:
                bins = sorted(counts)
                heights = [counts[i] for i in bins]
                places = [(i + 0.5) * width for i in bins]
                axis.bar(places, heights, width, bottom=[bottom[i] for i in bins], color=color, label=outcome)
            bottom.update(counts)
        top = max(bottom.values())
        for number, fault in enumerate(faults):
            axis.axvline(fault.at - start, color="gray", linestyle="--", linewidth=1)
            axis.text(fault.at - start, (1.02 + 0.07 * number) * top, f" {fault.name.split(',')[0]}", fontsize=8)
            axis.axvline(fault.ready_at - start, color="gray", linestyle=":", linewidth=1)
        axis.set(title=name, xlabel="sent at, s", ylabel=f"requests in {width:g} s", ylim=(0, 1.35 * top))
        axis.legend(loc="upper right", fontsize=8, ncols=2)
    save_plot(figure, path)


def shown(answer: Answer) -> str:
    """An outcome, with retried ones apart."""
    return "retried" if answer.outcome == "answered" and answer.retries else answer.outcome
