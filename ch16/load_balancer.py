"""Load balancing: one server is a single point of failure; which of several takes the next request?

Round robin is enough while all servers are up and all requests are alike. They are not: an answer takes a word or a
minute, a conversation is fastest on the replica that holds its KV cache, and replicas die in the middle of answers.
This script is therefore also a gateway: an HTTP proxy that checks its replicas, retries on another one while the client
has received nothing, and reports an error when an answer breaks off.

    python3 ch16/load_balancer.py                    # the lab: three vLLM replicas, each broken once
    python3 ch16/load_balancer.py --fake-replicas    # the same in seconds, on stand-ins (simulated)
    python3 ch16/load_balancer.py --servers gpu1:8000,gpu2:8000 --port 9000 --policy prefix     # the gateway
    python3 ch16/load_balancer.py --discover inference-server:8000 --port 9000     # for all addresses of a name

How to read the lab's first table: each row sent requests at the same rate through the same faults. `lost` requests
failed before the first byte of an answer; `cut off` answers ended in the middle, with an error event (told) or without.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import contextlib
import hashlib
import math
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping, Sequence

from tqdm import tqdm

from ch16.parts.load_balancer.breaker import CircuitBreaker, Lease, NoServer, ServerState
from ch16.parts.load_balancer.client import StreamedAnswer
from ch16.parts.load_balancer.flags import gateway_flags, serve
from ch16.parts.load_balancer.lab import REPLICAS, Fault, Plan, plan_for, replica_commands, run_lab, running
from ch16.parts.load_balancer.picture import plot
from ch16.parts.load_balancer.tables import FAULT_COLUMNS, OUTCOME_COLUMNS, claim, fault_rows, outcome_rows
from common import cli, models
from common.engine import quiet
from common.gpu import Machine, detect
from common.models import Model
from common.results import Report
from common.server import ServerProcess

# ---- configuration ----

POLICIES = ("round-robin", "least-in-flight", "prefix")
SPARE = 1.25  # policy `prefix`: a server takes at most this multiple of its share

# ---- mechanism ----


class LoadBalancer:
    """Which server takes the next request; safe from many threads. No I/O.

    - round-robin: one after another.
    - least-in-flight: the server with the fewest requests.
    - prefix: requests that begin alike go to the same server, which holds their KV cache, unless it has more than
      `SPARE` times its share (rendezvous hashing: each prefix ranks all servers; the bound: arXiv 1608.01350).

    The chapter's class has the first alone. Servers that are not ready, or whose breaker is open, are left out.
    `servers` are names, such as `host:port`; each once. `add` and `remove` change them.
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
        self._states = {name: ServerState(breaker()) for name in servers}
        self._next = 0
        self._lock = threading.Lock()

    def get_server(self, prefix: str = "", exclude: Collection[str] = ()) -> str:
        """The server that takes a request which begins with `prefix`, for callers that do not report when it ends.

        Raises:
            NoServer: no server besides those in `exclude`, which were tried already, can take it now.
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

    def _choose(self, prefix: str, exclude: Collection[str]) -> str:
        turn = self.servers[self._next :] + self.servers[: self._next]
        ready = (name for name in turn if name not in exclude and self._states[name].ready)
        able = [name for name in ready if self._states[name].breaker.allows()]
        if not able:
            raise NoServer("no server is ready")
        if self.policy == "least-in-flight":
            chosen = min(able, key=lambda name: self._states[name].in_flight)  # ties: the next in turn
        elif self.policy == "prefix" and prefix:
            chosen = self._by_prefix(prefix, able)
        else:
            chosen = able[0]
        self._next = (self.servers.index(chosen) + 1) % len(self.servers)
        return chosen

    def _by_prefix(self, prefix: str, able: Sequence[str]) -> str:
        """Each prefix ranks the servers in an order of its own: when one leaves, only its own prefixes move."""
        requests = sum(self._states[name].in_flight for name in able) + 1
        limit = math.ceil(SPARE * requests / len(able))
        ranked = sorted(able, key=lambda name: hashlib.blake2b(f"{name}\0{prefix}".encode(errors="replace")).digest())
        return next(name for name in ranked if self._states[name].in_flight < limit)  # not all can be above average

    def add(self, server: str) -> None:
        """A further server. It takes requests once `set_ready` says so."""
        with self._lock:
            if server in self._states:
                raise ValueError("each server once")
            self.servers += (server,)
            self._states[server] = ServerState(self._breaker(), ready=False)

    def remove(self, server: str) -> None:
        """No more requests to this server; those in flight go on."""
        with self._lock:
            del self._states[server]
            self.servers = tuple(name for name in self.servers if name != server)

    def set_ready(self, server: str, ready: bool) -> bool:
        """What an active check found. Returns whether that is a change; a server that comes back starts afresh."""
        with self._lock:
            state = self._states[server]
            changed, state.ready = state.ready != ready, ready
            if changed and ready:
                state.breaker.reset()
            return changed

    def any_ready(self) -> bool:
        """Whether a request would be taken."""
        with self._lock:
            return any(state.ready for state in self._states.values())

    def states(self) -> dict[str, dict[str, float]]:
        """Requests in flight, readiness and breaker of each server, for /metrics."""
        with self._lock:
            return {
                name: {"in_flight": s.in_flight, "ready": s.ready, "breaker_open": s.breaker.state == "open"}
                for name, s in self._states.items()
            }


# ---- measurement ----


def measure(
    args: argparse.Namespace, machine: Machine, model: Model | None, plan: Plan, results: Report
) -> tuple[dict[str, list[StreamedAnswer]], list[Fault]]:
    """Break each replica in turn while clients ask one server, round robin and the gateway; count what they saw.

    Without a model the replicas are stand-ins. Returns the answers by configuration, and the faults.
    """
    import uvloop

    name = model.name if model else "simulated"

    def body(number: int) -> dict[str, object]:
        prompt = f"Conversation {number % 20}. Once upon a time"
        return {"model": name, "prompt": prompt, "max_tokens": plan.tokens, **({"ignore_eos": True} if model else {})}

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        commands, logs = replica_commands(machine, model, args.seed), Path(folder)
        # On a GPU one after another: each measures the memory that is free.
        replicas = stack.enter_context(running(commands, logs, in_turn=machine.device == "cuda" and model is not None))
        addresses = [replica.address for replica in replicas]
        flags = ("--servers", ",".join(addresses), "--policy", args.policy, "--idle-timeout", str(plan.idle_s))
        gateway = stack.enter_context(ServerProcess([sys.executable, str(Path(__file__).resolve()), *flags], logs))
        print(f"{REPLICAS} replicas and the gateway are ready", flush=True)

        chapters = LoadBalancer(addresses)  # in the client, without checks or retries
        urls = {
            "one server": lambda: replicas[0].url,
            "plain round robin": lambda: f"http://{chapters.get_server()}",
            "gateway": lambda: gateway.url,
        }
        progress = stack.enter_context(tqdm(total=REPLICAS, unit="fault", leave=False, disable=None))
        answers, faults = uvloop.run(run_lab(replicas, urls, body, plan, progress))

    what = f"replicas of {name}" if model else "stand-in replicas (simulated)"
    load = f"{plan.rate:g} requests/s of {plan.tokens} tokens in each row"
    results.table("outcomes", f"{REPLICAS} {what}, {load}", outcome_rows(answers), OUTCOME_COLUMNS)
    fault_table = fault_rows(answers["gateway"], faults)
    results.table("faults", f"What each fault did behind the gateway, {what}", fault_table, FAULT_COLUMNS)
    return answers, faults


def report(
    args: argparse.Namespace, results: Report, answers: Mapping[str, Sequence[StreamedAnswer]], faults: Sequence[Fault]
) -> None:
    """Judge the claim, write JSON and picture."""
    results.claims([claim(*(results.tables[name]["rows"] for name in ("outcomes", "faults")))])
    results.save(args.json)
    if args.plot:
        plot(args.plot, answers, faults, results)


# ---- main ----


def lab(args: argparse.Namespace) -> int:
    """Start replicas and a gateway, break the replicas, count."""
    machine, model = detect(args.device), None
    fake = args.fake_replicas or args.quick
    if not fake:
        quiet()
        model = models.resolve(args.model, machine)
    plan = plan_for(machine, fake, args.quick)
    name = model.name if model else "simulated"
    settings = {"model": name, "policy": args.policy, "replicas": REPLICAS, "rate": plan.rate, "tokens": plan.tokens}
    results = Report("load_balancer.py", machine, settings, wide=args.wide)
    results.print_card()
    report(args, results, *measure(args, machine, model, plan, results))
    return 0


def main() -> int:
    """Parse the flags, then run the gateway or the lab."""
    parser = cli.standard_parser(__doc__, model_help="of the lab: auto, bundled, a folder, or a hub id")
    gateway_flags(parser, POLICIES)
    laboratory = parser.add_argument_group("lab")
    laboratory.add_argument("--fake-replicas", action="store_true", help="stand-ins without a model; also with --quick")
    parser.add_argument("--dummy-weights", help=argparse.SUPPRESS)  # a flag of other scripts: say why not of this one
    args = parser.parse_args()
    if args.dummy_weights:
        parser.error("random weights come without a tokenizer, and the lab sends text: use --model")
    if args.servers or args.discover:
        return serve(args, LoadBalancer(args.servers or (), args.policy))
    return lab(args)


if __name__ == "__main__":
    cli.run(main)
