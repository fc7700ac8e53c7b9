"""How much to simulate."""

from dataclasses import dataclass

from common.gpu import Machine


@dataclass(frozen=True)
class FleetSizes:
    """Slots per replica; factor on the trace's lengths; hours of bursts; first targets of a search."""

    slots: int
    scale: float
    hours: float
    targets: int


def sizes_for(machine: Machine, quick: bool) -> FleetSizes:
    """On a GPU fewer hours: a replica answers several times as many requests per hour."""
    if machine.device == "cuda":
        return FleetSizes(64, 1.0, 2.0, 5) if quick else FleetSizes(64, 1.0, 4.0, 12)
    return FleetSizes(8, 0.2, 2.0, 5) if quick else FleetSizes(8, 0.4, 8.0, 12)
