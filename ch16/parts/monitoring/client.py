"""Both sides of a server's metrics: clients that count what they get, and a scraper that reads /metrics meanwhile."""

import functools
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import requests
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from tqdm import tqdm

PATIENCE_S = 300


@dataclass(frozen=True)
class Reply:
    """What a client got for one request; times in seconds of `time.perf_counter`."""

    sent: float
    arrived: float
    tokens: int = 0
    error: str = ""

    @property
    def latency_s(self) -> float:
        """From sending to the end of the answer."""
        return self.arrived - self.sent


def ask(url: str, body: Mapping[str, object]) -> Reply:
    """Send one request."""
    sent = time.perf_counter()
    response = requests.post(url, json=body, timeout=PATIENCE_S)
    arrived = time.perf_counter()
    if response.ok:
        return Reply(sent, arrived, tokens=response.json()["tokens"])
    return Reply(sent, arrived, error=f"{response.status_code} {response.text}")


def send(url: str, bodies: Sequence[Mapping[str, object]], clients: int) -> list[Reply]:
    """Requests from so many threads, each of which sends the next one when it has its answer."""
    with ThreadPoolExecutor(clients) as pool:
        answers = pool.map(functools.partial(ask, url), bodies)
        return list(tqdm(answers, f"{clients} clients", len(bodies), leave=False, disable=None))


def most_at_once(answers: Sequence[Reply]) -> int:
    """The most requests that were in flight at the same time."""
    return max(sum(other.sent <= answer.sent < other.arrived for other in answers) for answer in answers)


@dataclass(frozen=True)
class Scrape:
    """A page of /metrics, and when it was read: between `sent` and `received`, by `time.perf_counter`."""

    sent: float
    received: float
    samples: Sequence[Sample]

    def value(self, name: str, **labels: str) -> float:
        """The value of one series."""
        return next(s.value for s in self.samples if s.name == name and s.labels == labels)

    def buckets(self, name: str) -> dict[float, float]:
        """Of a histogram: observations up to each upper bound."""
        return {float(s.labels["le"]): s.value for s in self.samples if s.name == f"{name}_bucket"}


class Scraper:
    """Reads a page of /metrics on entry, every `interval_s`, and on exit."""

    def __init__(self, url: str, interval_s: float) -> None:
        self.scrapes: list[Scrape] = []
        self._url, self._interval_s, self._done = url, interval_s, threading.Event()
        self._thread = threading.Thread(target=self._keep_reading)

    def _read(self) -> None:
        sent = time.perf_counter()
        page = requests.get(self._url, timeout=PATIENCE_S).text
        received = time.perf_counter()
        samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
        self.scrapes.append(Scrape(sent, received, samples))

    def _keep_reading(self) -> None:
        while not self._done.wait(self._interval_s):
            self._read()

    def __enter__(self) -> "Scraper":
        self._read()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()
        self._read()
