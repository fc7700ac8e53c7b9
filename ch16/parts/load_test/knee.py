"""Up to which rate does a server keep its promise? Pure search, over anything that measures a rate."""

from collections.abc import Callable, Sequence

GOOD_PERCENT = 90.0  # of the requests must meet the objective


def find_knee(measure: Callable[[float], dict], rates: Sequence[float], refine: int) -> tuple[float, list[dict]]:
    """The highest rate at which `GOOD_PERCENT` of the requests are good, as at every lower rate that was tried.

    Args:
        measure: a rate to a row with `good_percent`.
        rates: tried from the lowest to the highest, until two in a row fail.
        refine: halvings between the last good and the first bad rate.

    Returns:
        The rate (0.0 if none is good), and the rows by rate.
    """
    rows: dict[float, dict] = {}
    failed = 0
    for rate in sorted(rates):
        rows[rate] = measure(rate)
        failed = 0 if _good(rows[rate]) else failed + 1
        if failed == 2:
            break
    for _ in range(refine):
        low, high = _bracket(rows)
        if high is None:
            break
        rate = (low + high) / 2
        rows[rate] = measure(rate)
    return _bracket(rows)[0], [rows[rate] for rate in sorted(rows)]


def _good(row: dict) -> bool:
    return row["good_percent"] >= GOOD_PERCENT


def _bracket(rows: dict[float, dict]) -> tuple[float, float | None]:
    """The highest good rate below the first bad one, and that one (None: all are good)."""
    low = 0.0
    for rate in sorted(rows):
        if not _good(rows[rate]):
            return low, rate
        low = rate
    return low, None
