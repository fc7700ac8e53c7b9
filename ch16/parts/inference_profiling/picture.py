"""The picture of a profile: time by kind of work, and the roofline."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ch16.parts.inference_profiling.attribution import KINDS
from ch16.parts.inference_profiling.tables import KIND_KEYS
from ch16.parts.inference_profiling.work import Limits
from common.gpu import Machine
from common.plots import COLOURS, draw, legend_below, save_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KIND_COLOURS = ("variant", "second", "third", "fourth", "quiet")  # of KINDS
POINT_COLOURS = ("baseline", "variant", "second", "third", "fourth")  # prefill, decode, launch modes


def plot(path: str, tables: Mapping[str, Sequence[dict]], limits: Limits, model: str, machine: Machine) -> None:
    """`tables`: rows of the script's tables, by their names in the JSON."""
    figure, (bars, roofline) = draw(2)
    prefill, decode = tables["bounds"]
    _kinds(bars, tables["kinds"])
    modes = [row for row in tables.get("modes", ()) if row["what"] != "eager"]  # `decode` is eager
    _roofline(roofline, [prefill, decode, *modes], limits)
    save_plot(figure, path, f"Prefill is {prefill['verdict']}, decode is {decode['verdict']}", model, machine)


def _kinds(axis: "Axes", rows: Sequence[dict]) -> None:
    names = [row["what"].replace("compiled, CUDA", "compiled,\nCUDA") for row in rows]
    left = [0.0] * len(rows)
    for key, kind, colour in zip(KIND_KEYS, KINDS, KIND_COLOURS, strict=True):
        width = [row[key] for row in rows]
        axis.barh(names, width, left=left, label=kind, color=COLOURS[colour])
        left = [before + share for before, share in zip(left, width, strict=True)]
    axis.invert_yaxis()
    axis.set(title="Time by kind of work, profiled", xlabel="% of the phase", ylabel="phase", xlim=(0, 100))
    legend_below(axis)


def _roofline(axis: "Axes", points: Sequence[dict], limits: Limits) -> None:
    intensities = [row["intensity"] for row in points] + [limits.ridge]
    x = [min(intensities) / 4, limits.ridge, max(intensities) * 4]
    roof = [min(limits.flops_per_s, limits.bytes_per_s * intensity) / 1e12 for intensity in x]
    axis.loglog(x, roof, color=COLOURS["limit"], label=f"limits ({limits.source.split(':')[0]})")
    for row, colour in zip(points, POINT_COLOURS, strict=False):
        style = {"color": COLOURS[colour], "markersize": 10, "label": row["what"]}
        axis.loglog(row["intensity"], row["tflop_per_s"], "o", **style)
    axis.set(title="Roofline", xlabel="FLOP/byte", ylabel="TFLOP/s")
    legend_below(axis)
