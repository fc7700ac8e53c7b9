"""What `fp8_quant.py` prints: the columns of its tables, and the claims F1 to F3."""

from collections.abc import Mapping, Sequence

from ch16.parts.fp8_quant.precision import Precision
from common.results import Column, Verdict, judge, not_applicable

FORMAT_COLUMNS = (
    Column("format", "format"),
    Column("bits", "bits", "d"),
    Column("largest", "largest", ".4g"),
    Column("smallest_normal", "smallest normal", ".3g"),
    Column("smallest", "smallest", ".3g"),
    Column("steps", "steps from 2^n to 2^(n+1)", ",d"),
    Column("rounding_percent", "rounding error up to %", ".2g"),
)
ERROR_COLUMNS = (
    Column("tensor", "tensor"),
    Column("format", "format"),
    Column("scaling", "one scale per"),
    Column("error_percent", "relative error %", ".2f"),
    Column("row_error_percent", "mean over rows %", ".2f"),
    Column("zeroed_percent", "rounded to zero %", ".3f"),
    Column("saturated_percent", "saturated %", ".4f"),
)
MEMORY_COLUMNS = (
    Column("recipe", "recipe"),
    Column("bf16_mb", "BF16 weights MB", ",.1f"),
    Column("fp8_mb", "FP8 weights MB", ",.1f"),
    Column("weight_ratio", "FP8 / BF16", ".3f"),
    Column("bf16_peak_mb", "BF16 peak MB", ",.0f"),
    Column("fp8_peak_mb", "FP8 peak MB", ",.0f"),
    Column("difference", "output difference", ".3f"),
)
STACK_COLUMNS = (
    Column("recipe", "recipe"),
    Column("phase", "phase"),
    Column("tokens", "tokens at once", ",d"),
    Column("bf16_tokens_per_s", "BF16 tok/s", ",.0f"),
    Column("fp8_tokens_per_s", "FP8 tok/s", ",.0f"),
    Column("speedup", "FP8 speed-up", ".2f"),
    Column("bf16_eager", "BF16 eager tok/s", ",.0f"),
    Column("fp8_eager", "FP8 eager tok/s", ",.0f"),
    Column("graph_gain", "FP8 graph speed-up", ".1f", detail=True),
)
ACCURACY_COLUMNS = (
    Column("recipe", "recipe"),
    Column("tokens", "tokens", ",d"),
    Column("perplexity", "perplexity", ".3f"),
    Column("perplexity_ratio", "FP8 / BF16", ".4f"),
    Column("agreement_percent", "same top-1 %", ".1f"),
    Column("top1_percent", "top-1 right %", ".2f"),
    Column("top1_lost_percent", "top-1 lost %", ".2f"),
    Column("weight_ratio", "weight ratio", ".3f"),
)


def gemm_columns(precisions: Sequence[Precision]) -> list[Column]:
    """Columns of the rows of `measure_gemm`, with one for each recipe; the eager speed-up is that of the first."""
    return [
        Column("layer", "layer"),
        Column("tokens", "tokens", ",d"),
        Column("BF16", "BF16 TFLOP/s", ",.0f"),
        *[Column(p.name, f"{p.name} TFLOP/s", ",.0f") for p in precisions],
        Column("limit", "limit TFLOP/s", ",.0f"),
        Column("peak_percent", "best, % of peak", ".0f"),
        Column("of_limit", "best / limit", ".2f"),
        Column("speedup", "best speed-up", ".2f"),
        Column("eager_speedup", "eager speed-up", ".2f"),
    ]


def claims(
    memory: Sequence[dict], speed: Sequence[dict], readings: Sequence[dict], targets: Mapping[str, float]
) -> list[Verdict]:
    """Verdicts from rows of MEMORY_COLUMNS, of STACK_COLUMNS (none without FP8 units) and of ACCURACY_COLUMNS.

    `targets` are limits of the columns that have their names.
    """
    ratio = max(row["weight_ratio"] for row in memory)
    measured = f"weights {ratio:.3f} of BF16"
    if peaks := [row["fp8_peak_mb"] / row["bf16_peak_mb"] for row in memory if "fp8_peak_mb" in row]:
        measured += f"; with activations up to {max(peaks):.2f} (prefill)"
    halves = judge("F1", ratio <= targets["weight_ratio"], measured)

    if speed:
        phases = dict.fromkeys(row["phase"] for row in speed)
        best = {p: max((row for row in speed if row["phase"] == p), key=lambda row: row["speedup"]) for p in phases}
        text = ", ".join(f"{row['speedup']:.2f}x in {phase} ({row['recipe']})" for phase, row in best.items())
        doubles = judge("F2", min(row["speedup"] for row in best.values()) >= targets["speedup"], text)
    else:
        doubles = not_applicable("F2", "no FP8 units here: an emulated product is slower than BF16")

    last = readings[-1]
    rise, lost = last["perplexity_ratio"], last["top1_lost_percent"]
    text = f"{last['recipe']}, {last['tokens']:,} tokens: perplexity {100 * (rise - 1):+.1f}%, "
    text += f"right next tokens {-lost:+.1f}%"
    kept = rise <= targets["perplexity_ratio"] and lost < targets["top1_lost_percent"]
    return [halves, doubles, judge("F3", kept, text)]
