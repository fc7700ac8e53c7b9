"""The picture of a profile: time by kind, roofline, memory."""

from collections.abc import Mapping, Sequence

from ch16.parts.inference_profiling.attribution import GAPS, KINDS
from ch16.parts.inference_profiling.tables import KIND_KEYS
from ch16.parts.inference_profiling.work import Limits
from common.plots import draw, save_plot


def plot(path: str, kinds: Sequence[dict], points: Sequence[dict], limits: Limits, memory: Mapping) -> None:
    """Time by kind for each phase, the roofline with the measured points, and allocated memory over time."""
    figure, axes = draw(3 if memory else 2)
    bars, roofline = axes[:2]
    left = [0.0] * len(kinds)
    for key, kind in zip(KIND_KEYS, KINDS, strict=True):
        width = [row[key] for row in kinds]
        bars.barh(
            [row["what"] for row in kinds], width, left=left, label=kind, color="lightgrey" if kind == GAPS else None
        )
        left = [a + b for a, b in zip(left, width, strict=True)]
    bars.invert_yaxis()
    bars.set(title="where the time goes (profiled)", xlabel="% of the phase", xlim=(0, 100))
    bars.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize="small", frameon=False)
    at = [row["intensity"] for row in points] + [limits.ridge]
    x = [min(at) / 4, limits.ridge, max(at) * 4]
    roof = [min(limits.flops_per_s, limits.bytes_per_s * one) / 1e12 for one in x]
    roofline.loglog(x, roof, color="grey", label=f"limits ({limits.source.split(':')[0]})")
    for row in points:
        roofline.loglog(row["intensity"], row["tflop_per_s"], "o", label=f"{row['what']}: {row['verdict']}")
    roofline.set(title="roofline", xlabel="FLOP/byte", ylabel="TFLOP/s")
    roofline.legend(fontsize="small")
    start = min((changes[0][0] for changes in memory.values()), default=0.0)
    for name, changes in memory.items():
        axes[2].step([1e3 * (t - start) for t, _ in changes], [b / 1e6 for _, b in changes], where="post", label=name)
    if memory:
        axes[2].set(title="memory allocated", xlabel="ms", ylabel="MB", ylim=(0, None))
        axes[2].legend()
    save_plot(figure, path)
