"""Verdicts on the claims M1 and M2."""

from collections.abc import Sequence

from common.results import Verdict, judge, not_applicable

ERROR_TARGET_PERCENT = 15.0  # of the predicted throughput of a whole model
COST_TARGET_PERCENT = 5.0  # from here on imbalance "costs throughput"


def prediction_claim(validation: Sequence[dict], why_not: str) -> Verdict:
    """M1 from the rows of VALIDATION_COLUMNS; without any, n/a with the reason."""
    if not validation:
        return not_applicable("M1", why_not)
    throughput = validation[0]
    error, text = throughput["error_percent"], "predicted {predicted:,.0f}, measured {measured:,.0f} output tok/s"
    return judge("M1", abs(error) <= ERROR_TARGET_PERCENT, f"{text.format(**throughput)}: {error:+.1f}%")


def uneven_load_claim(patterns: Sequence[dict], on_ranks: str) -> Verdict:
    """M2 by trained routers if there are any, else by simulated Zipf routing, where the cost is highest.

    A cost larger than its own spread has priority over larger costs that are not.
    """
    trained = [row for row in patterns if row["pattern"].startswith("trained")]
    candidates = trained or [row for row in patterns if row["pattern"] == "zipf"]
    places = {"": "on one device", "rank_": on_ranks}
    costs = [
        (row[f"{prefix}cost_percent"], row.get(f"{prefix}spread_percent", 0.0), row, place)
        for row in candidates
        for prefix, place in places.items()
        if f"{prefix}cost_percent" in row
    ]
    cost, spread, row, place = max(costs, key=lambda found: (found[0] >= max(COST_TARGET_PERCENT, found[1]), found[0]))
    text = (
        f"{row['pattern']} routing{'' if trained else ' (simulated)'}, {row['tokens']:,} tokens: busiest expert "
        f"{row['max_mean']:.1f}x the mean, time over balanced routing {cost:+.0f}% {place}"
    )
    if abs(cost) < spread:
        return not_applicable("M2", f"that is less than repeated runs differ ({spread:.0f}%)", text)
    return judge("M2", cost >= COST_TARGET_PERCENT, text)
