"""Replicas and requests as arrays, for compiled code."""

from collections.abc import Sequence

import numpy as np

from common.traces import Arrival

OFF, SERVING, DRAINING = 0, 1, 2
REPLICA = np.dtype(
    [
        ("state", "i8"),
        ("started_s", "f8"),
        ("ready_s", "f8"),
        ("clock", "f8"),
        ("step", "i8"),  # its last step: when it ended, its number
        ("running", "i8"),
        ("waiting", "i8"),
        ("first", "i8"),
        ("last", "i8"),  # `first` and `last` of the waiting requests
        ("held", "i8"),  # tokens in the KV cache, less `step` for each running request
        ("busy_s", "f8"),
    ]
)
SLOT = np.dtype([("leaves", "i8"), ("name", "i8")])  # the step that gives a request its last token; its index
REQUEST = np.dtype(
    [
        ("at_s", "f8"),
        ("tokens_in", "i8"),
        ("tokens_out", "i8"),
        ("first_s", "f8"),
        ("last_s", "f8"),  # when its first and its last token came
        ("behind", "i8"),  # the request that waits next
    ]
)


def as_requests(trace: Sequence[Arrival]) -> np.ndarray:
    """A trace as an array [N] of REQUEST."""
    requests = np.zeros(len(trace), REQUEST)
    for name in ("at_s", "tokens_in", "tokens_out"):
        requests[name] = [getattr(arrival, name) for arrival in trace]
    return requests
