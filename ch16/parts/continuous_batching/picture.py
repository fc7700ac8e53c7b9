"""The picture: slots over time, batch sizes with their knee, gaps between tokens."""

from collections.abc import Mapping, Sequence

from ch16.parts.continuous_batching.drive import Course
from ch16.parts.continuous_batching.interference import NONE, Run, Way
from ch16.parts.continuous_batching.sizes import knee_of
from common.plots import draw, save_plot

BATCHES_SHOWN = 8


def plot(
    path: str,
    courses: Mapping[str, Course],
    sweeps: Mapping[str, Sequence[Mapping]],
    crossovers: Mapping[str, float | None],
    runs: Mapping[Way, Sequence[Run]],
) -> None:
    """Draw it.

    Args:
        courses: of the requests, by admission.
        sweeps: rows by phase.
        crossovers: batch by phase; None where it is not known.
        runs: of the streams, by way.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    figure, (slots, *sizes, gaps) = draw(4)
    shown_s = 0.0  # of all batches the first few: more are not to be told apart
    for name, course in courses.items():
        start = min(course.sent.values())
        batches = len(course.sent) / max(n for _, n in course.steps)
        shown_s = max(shown_s, (course.steps[-1][0] - start) * min(1, BATCHES_SHOWN / batches))
        slots.step([t - start for t, _ in course.steps], [n for _, n in course.steps], where="pre", lw=0.8, label=name)
    slots.set(title="requests running", xlabel="seconds", ylim=(0, None), xlim=(0, shown_s))
    slots.legend(loc="lower right")

    for axis, (phase, rows) in zip(sizes, sweeps.items(), strict=True):
        batches = [row["batch"] for row in rows]
        axis.plot(batches, [row["tokens_per_s"] for row in rows], "o-", label="tokens/s")
        other = axis.twinx()
        other.plot(batches, [row["ms"] for row in rows], "C1s--", label="ms (right)")
        lines = [*axis.get_lines(), *other.get_lines()]
        first, last = knee_of(rows)
        lines.append(axis.axvspan(first["batch"] / 1.1, last["batch"] * 1.1, color="C2", alpha=0.2, label="knee"))
        cross = crossovers[phase]
        if cross and cross <= 4 * batches[-1]:
            lines.append(axis.axvline(cross, color="C3", linestyle="-.", label=f"compute-bound from {cross:.0f}"))
        axis.set(title=phase, xlabel="batch", xscale="log", ylim=(0, None))
        axis.set_xticks(batches, batches)
        axis.minorticks_off()
        other.set(ylim=(0, None))
        axis.legend(lines, [line.get_label() for line in lines], loc="lower right")

    shown = [way for way in runs if way.name != NONE]
    for way in shown:
        stream = runs[way][0].gaps_s[0]
        label = way.name + (f", {way.budget} tokens a step" if way.budget else "")
        gaps.plot([1e3 * gap for gap in stream], lw=1, label=label)
    gaps.set(title="ms between tokens of a stream", xlabel="token", yscale="log")
    gaps.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    gaps.yaxis.set_major_formatter("{x:g}")
    gaps.yaxis.set_minor_locator(NullLocator())
    gaps.margins(y=0.3)  # room for the legend
    gaps.legend(fontsize="small", loc="upper right")
    save_plot(figure, path)
