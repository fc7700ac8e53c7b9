"""P1 from the verdicts of the prefill and the decode."""

from collections.abc import Sequence

from common.results import Verdict, judge, not_applicable


def claim(bounds: Sequence[dict], near_percent: float) -> Verdict:
    """P1 from rows of BOUNDS_COLUMNS; a phase that stays below `near_percent` of both limits decides nothing."""
    prefill, decode = bounds[:2]
    far = [
        row["what"]
        for row in (prefill, decode)
        if row["verdict"] != "launch-bound" and max(row["compute_percent"], row["memory_percent"]) < near_percent
    ]
    text = "; ".join(
        f"{row['what']} is {row['verdict']}: {row['compute_percent']:.0f}% of the compute limit, "
        f"{row['memory_percent']:.0f}% of the memory limit, {row['idle_percent']:.0f}% launch gaps"
        for row in (prefill, decode)
    )
    if far:
        reason = f"{' and '.join(far)} came near neither limit: the model or the prompt is too small to show one"
        return not_applicable("P1", reason, text)
    expected = prefill["verdict"] == "compute-bound" and decode["verdict"] in ("memory-bound", "launch-bound")
    return judge("P1", expected, text)
