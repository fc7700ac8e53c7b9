"""How much monitoring.py sends."""

from dataclasses import dataclass

from common.gpu import Machine


@dataclass(frozen=True)
class MonitoringSizes:
    """Clients at once, in turn; the requests of each client; the fewest and most tokens of an answer."""

    clients: tuple[int, ...]
    requests: int
    tokens: tuple[int, int]


def sizes_for(machine: Machine, quick: bool) -> MonitoringSizes:
    """A load of some seconds on a GPU or two CPU cores."""
    if machine.device == "cuda":
        return MonitoringSizes((1, 16, 64), 2 if quick else 8, (32, 256))
    return MonitoringSizes((1, 4, 8), 2 if quick else 6, (8, 48))
