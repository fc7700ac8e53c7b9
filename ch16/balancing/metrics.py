"""What the gateway tells Prometheus."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

OUTCOMES = (
    "ok",  # a whole answer of a replica that is no server error
    "error",  # a server error: the replica's own, or none could answer
    "truncated",  # broken off in the middle; the client was told
    "rejected",  # by the gateway itself: key, size, path, draining
    "cancelled",  # the client left
)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class GatewayMetrics:
    """The gateway's series, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("gateway_requests", "Requests by what became of them", ["outcome"], registry=registry)
        self.retries = Counter("gateway_retries", "Requests that went on to another server", registry=registry)
        self.first_byte = Histogram(
            "gateway_first_byte_seconds", "Request to the first byte of its answer", buckets=SECONDS, registry=registry
        )
        self._states = {
            "in_flight": Gauge("gateway_in_flight", "Requests at a server", ["server"], registry=registry),
            "ready": Gauge("gateway_server_ready", "1: its checks say so", ["server"], registry=registry),
            "breaker_open": Gauge("gateway_breaker_open", "1: it failed just now", ["server"], registry=registry),
        }
        for outcome in OUTCOMES:
            self.requests.labels(outcome)

    def render(self, states: Mapping[str, Mapping[str, float]]) -> bytes:
        """The page of /metrics, with the state of each server."""
        for server, state in states.items():
            for name, gauge in self._states.items():
                gauge.labels(server).set(state[name])
        return generate_latest(self._registry)
