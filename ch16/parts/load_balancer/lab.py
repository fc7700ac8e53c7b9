"""The lab: replicas are killed, stopped and drained while clients send requests in several ways at the same time."""

import asyncio
import contextlib
import functools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from tqdm import tqdm

from ch16.parts.load_balancer.client import StreamedAnswer, steady
from common.gpu import Machine, device_names
from common.models import ROOT, Model
from common.server import ServerProcess
from common.standin import standin_command

REPLICAS = 3  # each meets a fault of its own


@dataclass(frozen=True)
class Plan:
    """The load, and how long each fault lasts, in seconds."""

    rate: float  # requests/s of each kind of clients
    tokens: int
    gap_s: float  # between two faults
    down_s: float  # from a replica's death to its restart
    hang_s: float
    patience_s: float  # of a client

    @property
    def idle_s(self) -> float:
        """How long the gateway waits for the next part of an answer: less than a replica hangs."""
        return self.hang_s / 2


def plan_for(machine: Machine, fake: bool, quick: bool) -> Plan:
    """A load that leaves room for two thirds of the replicas."""
    if fake:
        return Plan(20, 25, 1.5 if quick else 3, 1.0, 4.0, 10)
    if machine.device == "cuda":
        return Plan(10, 64, 5, 2.0, 8.0, 30)
    return Plan(1.0, 48, 8, 2.0, 8.0, 30)


def replica_commands(machine: Machine, model: Model | None, seed: int) -> list[tuple[list[str], dict[str, str]]]:
    """How to start each replica, and its environment: stand-ins without a model, else the production server."""
    if model is None:
        return [(standin_command(), {}) for _ in range(REPLICAS)]
    command = [sys.executable, str(ROOT / "ch16" / "inference_serving.py"), "--serve", "--seed", str(seed)]
    command += ["--max-num-seqs", "32", "--model", model.absolute_path]
    if machine.device == "cpu":  # one thread each, on few cores for many processes
        return [([*command, "--device", "cpu"], {"OMP_NUM_THREADS": "1"}) for _ in range(REPLICAS)]
    share = 0.85 / math.ceil(REPLICAS / machine.count)
    memory = ["--tensor-parallel", "1", "--gpu-memory-utilization", f"{share:.2f}"]
    devices = device_names(machine)
    return [([*command, *memory], {"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]}) for i in range(REPLICAS)]


@contextlib.contextmanager
def running(
    commands: Sequence[tuple[list[str], dict[str, str]]], logs: Path, in_turn: bool
) -> Iterator[list[ServerProcess]]:
    """Replicas that are ready; stopped at the end. `in_turn`: one is ready before the next starts."""
    replicas = [ServerProcess(command, logs, env) for command, env in commands]
    with contextlib.ExitStack() as stack:
        for replica in tqdm(replicas, desc="starting replicas", leave=False, disable=None):
            stack.callback(replica.stop)
            replica.start()
            if in_turn:
                replica.wait_ready()
        for replica in replicas:
            replica.wait_ready()
        yield replicas


@dataclass
class Fault:
    """Something that happened to a replica; times by `time.perf_counter`."""

    name: str
    server: str
    at: float
    ready_at: float = float("nan")


async def run_lab(
    replicas: Sequence[ServerProcess],
    urls: Mapping[str, Callable[[], str]],  # by configuration: where the next request goes
    body: Callable[[int], Mapping[str, object]],
    plan: Plan,
    progress: tqdm,
) -> tuple[dict[str, list[StreamedAnswer]], list[Fault]]:
    """The answers by configuration while the faults happen one after another, and the faults."""
    stop = asyncio.Event()
    load = functools.partial(steady, body=body, rate=plan.rate, stop=stop, patience_s=plan.patience_s)
    loads = [asyncio.create_task(load(url, name.replace(" ", "-"))) for name, url in urls.items()]
    faults: list[Fault] = []

    def begin(name: str, replica: ServerProcess) -> Fault:
        progress.set_description(name)
        faults.append(Fault(name, replica.address, time.perf_counter()))
        return faults[-1]

    async def end(fault: Fault, replica: ServerProcess) -> None:
        fault.ready_at = await ready(replica)
        progress.update()
        await asyncio.sleep(plan.gap_s)

    try:
        first, second, third = replicas
        await asyncio.sleep(plan.gap_s)

        fault = begin("SIGKILL, started again", first)
        first.signal_all(signal.SIGKILL)
        await asyncio.to_thread(first.process.wait)
        await asyncio.sleep(plan.down_s)
        first.start()
        await end(fault, first)

        fault = begin("SIGSTOP, continued", second)
        second.signal_all(signal.SIGSTOP)
        await asyncio.sleep(plan.hang_s)
        second.signal_all(signal.SIGCONT)
        await end(fault, second)

        fault = begin("SIGTERM, started again", third)
        third.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(third.process.wait)
        third.start()
        await end(fault, third)
    finally:
        stop.set()
        answers = await asyncio.gather(*loads)
    return dict(zip(urls, answers, strict=True)), faults


async def ready(replica: ServerProcess) -> float:
    """Wait until a replica takes requests. Returns when that was; CannotRun if it ended instead."""
    timeout = aiohttp.ClientTimeout(total=1)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while replica.process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with session.get(replica.url + "/ready") as answer:
                    if answer.status == 200:
                        return time.perf_counter()
            await asyncio.sleep(0.02)
    replica.wait_ready()  # says why it cannot be
    raise AssertionError
