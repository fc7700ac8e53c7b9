"""F1 to F3 from the rows of the measurements."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.results import Verdict, judge, not_applicable


@dataclass(frozen=True)
class Fp8Targets:
    """What the chapter claims, as limits of ratios FP8 / BF16."""

    weight_ratio: float
    speedup: float
    perplexity_ratio: float
    top1_lost_percent: float


def claims(
    memory: Sequence[dict], speed: Sequence[dict], readings: Sequence[dict], targets: Fp8Targets
) -> list[Verdict]:
    """Verdicts from rows of MEMORY_COLUMNS, of STACK_COLUMNS (none without FP8 units) and of ACCURACY_COLUMNS."""
    ratio = max(row["weight_ratio"] for row in memory)
    measured = f"weights {ratio:.3f} of BF16"
    if peaks := [row["fp8_peak_mb"] / row["bf16_peak_mb"] for row in memory if "fp8_peak_mb" in row]:
        measured += f"; with activations up to {max(peaks):.2f} (prefill)"
    halves = judge("F1", ratio <= targets.weight_ratio, measured)

    if speed:
        phases = dict.fromkeys(row["phase"] for row in speed)
        best = {p: max((row for row in speed if row["phase"] == p), key=lambda row: row["speedup"]) for p in phases}
        text = ", ".join(f"{row['speedup']:.2f}x in {phase} ({row['recipe']})" for phase, row in best.items())
        doubles = judge("F2", min(row["speedup"] for row in best.values()) >= targets.speedup, text)
    else:
        doubles = not_applicable("F2", "no FP8 units here: an emulated product is slower than BF16")

    last = readings[-1]
    text = (
        f"{last['recipe']}, {last['tokens']:,} tokens: perplexity {100 * (last['perplexity_ratio'] - 1):+.1f}%, "
        f"right next tokens {-last['top1_lost_percent']:+.1f}%"
    )
    kept = (
        last["perplexity_ratio"] <= targets.perplexity_ratio and last["top1_lost_percent"] < targets.top1_lost_percent
    )
    return [halves, doubles, judge("F3", kept, text)]
