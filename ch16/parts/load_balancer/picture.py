"""The picture of the lab: unanswered requests over time, and what became of them."""

from collections.abc import Mapping, Sequence

from ch16.parts.load_balancer.client import StreamedAnswer
from ch16.parts.load_balancer.lab import Fault
from common.plots import COLOURS, draw, legend_below, save_plot
from common.results import Report

LINES = {"one server": "baseline", "plain round robin": "second", "gateway": "variant"}
OUTCOMES = {"lost": "bad", "cut off, not told": "fourth", "cut off, told": "fifth", "duplicated": "third"}


def plot(path: str, answers: Mapping[str, Sequence[StreamedAnswer]], faults: Sequence[Fault], results: Report) -> None:
    """Left: requests without a whole answer so far, with the faults shaded. Right: by outcome."""
    figure, (left, right) = draw(2)
    start = min(answer.sent for seen in answers.values() for answer in seen)
    end = max(answer.sent for seen in answers.values() for answer in seen) - start
    bad = {
        name: sorted(answer.sent - start for answer in seen if answer.outcome != "answered")
        for name, seen in answers.items()
    }
    top = max(map(len, bad.values())) or 1
    for name, times in bad.items():
        counts = [*range(len(times) + 1), len(times)]
        left.step([0, *times, end], counts, where="post", color=COLOURS[LINES[name]], label=name)
    for fault in faults:
        began, over = fault.at - start, fault.ready_at - start
        left.axvspan(began, over, color=COLOURS["quiet"], alpha=0.25)
        left.text((began + over) / 2, 1.04 * top, fault.name.split(",")[0], ha="center")
    left.set(title="Each replica fails once (shaded)", xlim=(0, end), ylim=(0, 1.15 * top))
    left.set(xlabel="time the request was sent, s", ylabel="unanswered requests so far")
    legend_below(left, 3)

    names, bottom = [name.replace(" ", "\n", 1) for name in answers], [0] * len(answers)
    for outcome, colour in OUTCOMES.items():
        counts = [sum(answer.outcome == outcome for answer in seen) for seen in answers.values()]
        if any(counts):
            right.bar(names, counts, 0.6, bottom=bottom, color=COLOURS[colour], label=outcome)
            bottom = [below + count for below, count in zip(bottom, counts, strict=True)]
    shares = [100 * len(times) / len(answers[name]) for name, times in bad.items()]
    for place, (height, share) in enumerate(zip(bottom, shares, strict=True)):
        right.text(place, height + 0.02 * top, f"{share:.1f}%", ha="center")
    right.set(title="What became of them", ylabel="unanswered requests", ylim=(0, 1.15 * top))
    if any(bottom):
        legend_below(right, 2)
    single, robin, gateway = (len(times) for times in bad.values())
    message = f"Unanswered: {gateway:,} of {len(answers['gateway']):,} behind the gateway, "
    message += f"{single:,} with one server, {robin:,} with round robin"
    model = results.settings["model"]
    simulated = model == "simulated"
    save_plot(figure, path, message, "stand-in replicas" if simulated else model, results.machine, simulated=simulated)
