"""How much to measure: the load on the real engine, the requests to simulate."""

from dataclasses import dataclass

from common.costs import Costs
from common.gpu import Machine

LEAST = 50  # live requests: a fifth of them have high priority, and of fewer there may be none


@dataclass(frozen=True)
class SchedulingSizes:
    """The live load, and how many requests are simulated."""

    slots: int  # requests that are decoded together
    tokens_in: int
    tokens_out: int  # on average
    seconds: float  # during which requests come; longer for a slow model, see live_load
    simulated: int = 100_000
    load: float = 1.3  # over the engine's capacity: a queue grows

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens in and out of a request."""
        return self.tokens_in, self.tokens_out


def sizes_for(machine: Machine, quick: bool) -> SchedulingSizes:
    """A load that saturates the engine for seconds."""
    simulated = 10_000 if quick else 100_000
    if machine.device == "cuda":
        return SchedulingSizes(64, 256, 128, 10 if quick else 40, simulated)
    return SchedulingSizes(8, 32, 16, 2.5, simulated) if quick else SchedulingSizes(8, 32, 24, 15, simulated)


def live_load(sizes: SchedulingSizes, costs: Costs) -> tuple[int, float, float]:
    """How many requests to send, how many per second on average, and for how many seconds.

    A model so slow that it answers fewer than LEAST within `sizes.seconds` gets more time.
    """
    per_s = sizes.load / costs.slot_s(sizes.slots, *sizes.tokens)
    seconds = max(sizes.seconds, LEAST / per_s)
    return max(LEAST, int(per_s * seconds)), per_s, seconds
