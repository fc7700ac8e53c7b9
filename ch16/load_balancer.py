"""Load balancing: one server is a single point of failure; which of several takes the next request?

Round robin is enough while all are well and requests are alike. They are not: answers take from a word to a minute, a
conversation is fast on the replica that holds its KV cache, and replicas die in the middle of answers. So this is also
a gateway: an HTTP proxy that checks its replicas, tries another one as long as the client has seen nothing, and says so
when an answer breaks off.

    python3 ch16/load_balancer.py                    # the lab: three replicas of vLLM, and what can happen to them
    python3 ch16/load_balancer.py --fake-replicas    # the same in seconds, on stand-ins (simulated)
    python3 ch16/load_balancer.py --servers gpu1:8000,gpu2:8000 --port 9000 --policy prefix     # the gateway
    python3 ch16/load_balancer.py --discover inference-server:8000 --port 9000     # for all addresses that a name has

How to read the lab's first table: each row sent requests at the same rate and met the same faults. `lost` failed
although the client had seen no byte of an answer; `cut off` ended in the middle, and was either told so or not.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import contextlib
import functools
import hashlib
import logging
import math
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from ch16.parts.load_balancer.breaker import CircuitBreaker, NoServer
from ch16.parts.load_balancer.discovery import addresses
from ch16.parts.load_balancer.gateway import Gateway, Limits
from ch16.parts.load_balancer.lab import FAULT_COLUMNS, OUTCOME_COLUMNS, Plan, claim, fault_rows, outcome_rows, run_lab
from ch16.parts.load_balancer.picture import plot
from common import cli, models
from common.engine import quiet
from common.gpu import Machine, detect, device_names
from common.models import Model
from common.results import Report
from common.server import ServerProcess, listen
from common.standin import standin_command

# ---- configuration ----

POLICIES = ("round-robin", "least-in-flight", "prefix")
SPARE = 1.25  # with policy `prefix`: a server takes at most so much more than its share
REPLICAS = 3


def plan_for(machine: Machine, fake: bool, quick: bool) -> Plan:
    """A load that leaves room for two thirds of the replicas."""
    if fake:
        return Plan(20, 25, 1.5 if quick else 3, 1.0, 4.0, 10)
    if machine.device == "cuda":
        return Plan(10, 64, 5, 2.0, 8.0, 30)
    return Plan(1.0, 48, 8, 2.0, 8.0, 30)


# ---- mechanism: the chapter's balancer ----


@dataclass(frozen=True)
class Lease:
    """A request at a server. `trial`: the one that finds out whether a server that failed is well again."""

    server: str
    trial: bool
    state: "_Server" = field(repr=False, compare=False)


@dataclass
class _Server:
    breaker: CircuitBreaker
    ready: bool = True
    in_flight: int = 0


class LoadBalancer:
    """Which server takes the next request; safe from many threads. No I/O.

    - round-robin: one after another.
    - least-in-flight: the one with the fewest requests.
    - prefix: requests that begin alike go to the same server, which holds their KV cache, unless it has more than
      `SPARE` times its share (rendezvous hashing; the bound is that of arXiv 1608.01350).

    Servers that are not ready, or whose breaker is open, are left out.

    Args:
        servers: names, such as `host:port`; each once. `add` and `remove` change them.
        policy: one of the three.
        breaker: makes one for each server.
    """

    def __init__(
        self,
        servers: Sequence[str],
        policy: str = "round-robin",
        breaker: Callable[[], CircuitBreaker] = CircuitBreaker,
    ) -> None:
        if len(set(servers)) < len(servers):
            raise ValueError("each server once")
        if policy not in POLICIES:
            raise ValueError(f"no policy '{policy}'; there are {', '.join(POLICIES)}")
        self.servers, self.policy, self._breaker = tuple(servers), policy, breaker
        self._states = {name: _Server(breaker()) for name in servers}
        self._next = 0
        self._lock = threading.Lock()

    def get_server(self, prefix: str = "", exclude: Collection[str] = ()) -> str:
        """The server that takes the next request, for callers that do not say when it ends.

        Args:
            prefix: what the request begins with (policy `prefix`).
            exclude: servers that were tried already.

        Raises:
            NoServer: none can take it now.
        """
        with self._lock:
            return self._choose(prefix, exclude)

    def take(self, prefix: str = "", exclude: Collection[str] = ()) -> Lease:
        """As `get_server`; the request counts as in flight until `give_back`."""
        with self._lock:
            server = self._choose(prefix, exclude)
            state = self._states[server]
            state.in_flight += 1
            return Lease(server, state.breaker.began(), state)

    def give_back(self, lease: Lease, ok: bool | None) -> None:
        """The request has ended: well, or not; None says nothing about the server (the client left)."""
        with self._lock:
            lease.state.in_flight -= 1
            lease.state.breaker.ended(ok, lease.trial)

    def add(self, server: str) -> None:
        """One server more. It takes requests once `set_ready` says so."""
        with self._lock:
            if server in self._states:
                raise ValueError("each server once")
            self.servers += (server,)
            self._states[server] = _Server(self._breaker(), ready=False)

    def remove(self, server: str) -> None:
        """One server less: no more requests for it; those in flight go on."""
        with self._lock:
            del self._states[server]
            self.servers = tuple(name for name in self.servers if name != server)

    def set_ready(self, server: str, ready: bool) -> bool:
        """What an active check found. Returns whether it is news; a server that comes back starts afresh."""
        with self._lock:
            state = self._states[server]
            changed, state.ready = state.ready != ready, ready
            if changed and ready:
                state.breaker.reset()
            return changed

    def any_ready(self) -> bool:
        """Would anybody take a request?"""
        with self._lock:
            return any(state.ready for state in self._states.values())

    def states(self) -> dict[str, dict[str, float]]:
        """Requests in flight, readiness and breaker of each server, for /metrics."""
        with self._lock:
            return {
                name: {
                    "in_flight": state.in_flight,
                    "ready": state.ready,
                    "breaker_open": state.breaker.state == "open",
                }
                for name, state in self._states.items()
            }

    # ---- inside the lock ----

    def _choose(self, prefix: str, exclude: Collection[str]) -> str:
        turn = self.servers[self._next :] + self.servers[: self._next]
        able = [
            name
            for name in turn
            if name not in exclude and self._states[name].ready and self._states[name].breaker.allows()
        ]
        if not able:
            raise NoServer("no server is ready")
        if self.policy == "least-in-flight":
            chosen = min(able, key=lambda name: self._states[name].in_flight)  # of equals the next in turn
        elif self.policy == "prefix" and prefix:
            chosen = self._by_prefix(prefix, able)
        else:
            chosen = able[0]
        self._next = (self.servers.index(chosen) + 1) % len(self.servers)
        return chosen

    def _by_prefix(self, prefix: str, able: Sequence[str]) -> str:
        """Each prefix ranks the servers in an order of its own: when one leaves, only its own prefixes move."""
        requests = sum(self._states[name].in_flight for name in able) + 1
        most = math.ceil(SPARE * requests / len(able))
        ranked = sorted(able, key=lambda name: hashlib.blake2b(f"{name}\0{prefix}".encode(errors="replace")).digest())
        return next(name for name in ranked if self._states[name].in_flight < most)  # they cannot all be above average


# ---- the gateway ----


def serve(args: argparse.Namespace) -> int:
    """Run the gateway until a signal."""
    import uvloop

    limits = Limits(
        first_byte_s=args.first_byte_timeout,
        idle_s=args.idle_timeout,
        request_s=args.request_timeout,
        check_s=args.check_interval,
        drain_s=args.drain_timeout,
        retries=args.retries,
        max_body_bytes=args.max_body_bytes,
    )
    balancer = LoadBalancer(args.servers or (), args.policy)
    keys = (
        args.api_key or os.environ.get("GATEWAY_API_KEY", ""),
        args.server_key or os.environ.get("VLLM_API_KEY", ""),
    )
    find = functools.partial(addresses, *args.discover) if args.discover else None
    gateway = Gateway(balancer, limits, *keys, ready_path=args.ready_path, find=find)
    listener = listen(args.host, args.port)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # else a traceback for every malformed request
    servers = ", ".join(args.servers or ("{}:{}".format(*args.discover),))
    print(f"gateway on http://{args.host}:{args.port} for {servers} ({args.policy})", flush=True)
    uvloop.run(gateway.run(listener))
    return 0


def server_list(text: str) -> list[str]:
    """argparse type: host:port,host:port,..."""
    servers = [server.strip().removeprefix("http://").rstrip("/") for server in text.split(",")]
    for server in servers:
        host, _, port = server.rpartition(":")
        if not host or not port.isdigit() or "/" in server:
            raise argparse.ArgumentTypeError(f"'{server}' is not host:port")
    if len(set(servers)) < len(servers):
        raise argparse.ArgumentTypeError("each server once")
    return servers


def name_and_port(text: str) -> tuple[str, int]:
    """argparse type: name:port, one of them."""
    servers = server_list(text)
    if len(servers) > 1:
        raise argparse.ArgumentTypeError(f"'{text}' is more than one name")
    name, _, port = servers[0].rpartition(":")
    return name, int(port)


# ---- measurement: the lab ----


def replica_commands(machine: Machine, model: Model | None, seed: int) -> list[tuple[list[str], dict[str, str]]]:
    """How to start each replica, and its environment: stand-ins without a model, else the production server."""
    if model is None:
        return [(standin_command(), {}) for _ in range(REPLICAS)]
    script = Path(__file__).with_name("inference_serving.py")
    command = [sys.executable, str(script), "--serve", "--seed", str(seed), "--max-num-seqs", "32"]
    command += ["--model", model.absolute_path]
    if machine.device == "cpu":  # one thread each, on few cores for many processes
        return [([*command, "--device", "cpu"], {"OMP_NUM_THREADS": "1"}) for _ in range(REPLICAS)]
    share = 0.85 / math.ceil(REPLICAS / machine.count)
    memory = ["--tensor-parallel", "1", "--gpu-memory-utilization", f"{share:.2f}"]
    devices = device_names(machine)
    return [([*command, *memory], {"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]}) for i in range(REPLICAS)]


def lab(args: argparse.Namespace) -> int:
    """Start replicas and a gateway, break the replicas, count."""
    import uvloop

    machine = detect(args.device)
    fake = args.fake_replicas or args.quick
    model = None
    if not fake:
        quiet()
        model = models.resolve(args.model, machine)
    plan = plan_for(machine, fake, args.quick)
    name = model.name if model else "simulated"
    settings = {"model": name, "policy": args.policy, "replicas": REPLICAS, "rate": plan.rate, "tokens": plan.tokens}
    report = Report("load_balancer.py", machine, settings)
    report.print_card()

    def body(number: int) -> dict[str, object]:
        prompt = f"Conversation {number % 20}. Once upon a time"
        return {"model": name, "prompt": prompt, "max_tokens": plan.tokens, **({} if fake else {"ignore_eos": True})}

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        logs = Path(folder)
        replicas = [ServerProcess(command, logs, env) for command, env in replica_commands(machine, model, args.seed)]
        for replica in replicas:
            stack.callback(replica.stop)
            replica.start()
            if machine.device == "cuda" and not fake:
                replica.wait_ready()  # one after another: each measures the memory that is free
        for replica in replicas:
            replica.wait_ready()
        addresses = [replica.address for replica in replicas]
        flags = ("--servers", ",".join(addresses), "--policy", args.policy, "--idle-timeout", str(plan.idle_s))
        gateway = stack.enter_context(ServerProcess([sys.executable, __file__, *flags], logs))
        print(f"{REPLICAS} replicas and the gateway are ready", flush=True)
        work = run_lab(
            replicas,
            gateway.url,
            LoadBalancer(addresses).get_server,
            body,
            plan,
            lambda fault: print(f"... {fault}", file=sys.stderr),
        )
        answers, faults = uvloop.run(work)

    what = "stand-in replicas (simulated)" if fake else f"replicas of {name}"
    load = f"{plan.rate:g} requests/s of {plan.tokens} tokens on each path"
    rows, fault_table = outcome_rows(answers), fault_rows(answers["gateway"], faults)
    report.table("outcomes", f"{REPLICAS} {what}, {load}", rows, OUTCOME_COLUMNS)
    report.table("faults", f"What each fault did behind the gateway, {what}", fault_table, FAULT_COLUMNS)
    report.claims([claim(rows, fault_table)])
    report.save(args.json)
    if args.plot:
        plot(args.plot, answers, faults)
    return 0


def main() -> int:
    """Parse the flags, then run the gateway or the lab."""
    parser = cli.standard_parser(__doc__, model_help="of the lab: auto, bundled, a folder, or a hub id")
    gateway = parser.add_argument_group("gateway")
    servers = gateway.add_mutually_exclusive_group()
    servers.add_argument("--servers", type=server_list, metavar="HOST:PORT,...", help="run the gateway for these")
    servers.add_argument(
        "--discover", type=name_and_port, metavar="NAME:PORT", help="run it for all addresses of a name, as they change"
    )
    gateway.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines")
    gateway.add_argument("--port", type=int, default=9000, help="where it listens")
    gateway.add_argument("--policy", choices=POLICIES, default="least-in-flight", help="who takes the next request")
    gateway.add_argument("--api-key", default="", help="clients must send it; or GATEWAY_API_KEY")
    gateway.add_argument("--server-key", default="", help="sent to the servers; or VLLM_API_KEY")
    gateway.add_argument("--ready-path", default="/ready", help="200 there: takes requests; /health for a plain vLLM")
    gateway.add_argument("--retries", type=cli.non_negative_int, default=Limits.retries, help="more servers to try")
    for flag, limit, what in (
        ("--first-byte-timeout", "first_byte_s", "for the first byte of an answer"),
        ("--idle-timeout", "idle_s", "between two parts of an answer"),
        ("--request-timeout", "request_s", "for a client to send its request"),
        ("--check-interval", "check_s", "between two checks of a server"),
        ("--drain-timeout", "drain_s", "after SIGTERM, for requests in flight"),
    ):
        gateway.add_argument(flag, type=cli.positive_float, default=getattr(Limits, limit), metavar="S", help=what)
    gateway.add_argument("--max-body-bytes", type=cli.positive_int, default=Limits.max_body_bytes, help="then 413")
    laboratory = parser.add_argument_group("lab")
    laboratory.add_argument("--fake-replicas", action="store_true", help="stand-ins without a model; also with --quick")
    parser.add_argument("--dummy-weights", help=argparse.SUPPRESS)  # a flag of other scripts: say why not of this one
    args = parser.parse_args()
    if args.dummy_weights:
        parser.error("random weights come without a tokenizer, and the lab sends text: use --model")
    return serve(args) if args.servers or args.discover else lab(args)


if __name__ == "__main__":
    cli.run(main)
