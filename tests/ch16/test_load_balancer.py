import collections
import math
import socket
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch16 import load_balancer
from ch16.load_balancer import SPARE, LoadBalancer
from ch16.parts.load_balancer.breaker import CircuitBreaker, NoServer

NAMES = ("a:1", "b:2", "c:3")


# ---- the policies ----


def test_the_chapters_calls():
    balancer = LoadBalancer(["gpu1:8000", "gpu2:8000"])
    assert [balancer.get_server() for _ in range(3)] == ["gpu1:8000", "gpu2:8000", "gpu1:8000"]


@pytest.mark.parametrize(("servers", "policy"), [(["a:1", "a:1"], "round-robin"), (["a:1"], "x")])
def test_bad_arguments(servers, policy):
    with pytest.raises(ValueError, match=r"server|policy"):
        LoadBalancer(servers, policy)


def test_turns_are_fair_under_threads():
    balancer = LoadBalancer(NAMES)
    counts = collections.Counter()

    def ask():
        mine = collections.Counter(balancer.get_server() for _ in range(3_000))
        with lock:
            counts.update(mine)

    lock = threading.Lock()
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == dict.fromkeys(NAMES, 8_000)


def test_leases_are_counted_under_threads():
    balancer = LoadBalancer(NAMES, "least-in-flight")

    def work():
        for _ in range(2_000):
            balancer.give_back(balancer.take(), True)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [state["in_flight"] for state in balancer.states().values()] == [0, 0, 0]


class Twin:
    """The same by brute force, from the words of the docstring: each server is looked at, nothing is kept."""

    def __init__(self, policy):
        self.policy = policy
        self.in_flight = dict.fromkeys(NAMES, 0)
        self.ready = dict.fromkeys(NAMES, True)
        self.failed = dict.fromkeys(NAMES, 0)  # in a row; three open the breaker, and no time passes here
        self.last = NAMES[-1]

    def able(self, exclude):
        turn = NAMES[NAMES.index(self.last) + 1 :] + NAMES[: NAMES.index(self.last) + 1]
        return [n for n in turn if self.ready[n] and self.failed[n] < 3 and n not in exclude]

    def may_choose(self, prefix, exclude):
        able = self.able(exclude)
        if self.policy == "least-in-flight":
            fewest = min((self.in_flight[n] for n in able), default=0)
            return [n for n in able if self.in_flight[n] == fewest][:1]
        if self.policy == "prefix" and prefix:
            total = sum(self.in_flight[n] for n in able) + 1
            return [n for n in able if self.in_flight[n] < math.ceil(SPARE * total / len(able))]
        return able[:1]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.sampled_from(["", "p", "q", "r"]), st.sets(st.sampled_from(NAMES), max_size=2)),
        st.tuples(st.just("end"), st.integers(0, 99), st.sampled_from([True, False, None])),
        st.tuples(st.just("ready"), st.sampled_from(NAMES), st.booleans()),
    ),
    max_size=80,
)


@pytest.mark.parametrize("policy", load_balancer.POLICIES)
@given(steps=STEPS)
def test_against_the_twin(policy, steps):
    balancer = LoadBalancer(NAMES, policy, lambda: CircuitBreaker(failures=3, clock=lambda: 0.0))
    twin, leases = Twin(policy), []
    home = {}  # which server a prefix goes to while nothing stands against it
    for step in steps:
        if step[0] == "take":
            _, prefix, exclude = step
            allowed = twin.may_choose(prefix, exclude)
            if not allowed:
                with pytest.raises(NoServer):
                    balancer.take(prefix, exclude)
                continue
            lease = balancer.take(prefix, exclude)
            assert lease.server in allowed and not lease.trial
            if policy == "prefix" and prefix:
                key = (prefix, tuple(sorted(allowed)))  # the same choice of servers: the same server
                assert home.setdefault(key, lease.server) == lease.server
            twin.in_flight[lease.server] += 1
            twin.last = lease.server
            leases.append(lease)
        elif step[0] == "end" and leases:
            lease = leases.pop(step[1] % len(leases))
            balancer.give_back(lease, step[2])
            twin.in_flight[lease.server] -= 1
            if step[2] is not None:
                twin.failed[lease.server] = 0 if step[2] else twin.failed[lease.server] + 1
        elif step[0] == "ready":
            _, server, ready = step
            assert balancer.set_ready(server, ready) == (twin.ready[server] != ready)
            if ready and not twin.ready[server]:
                twin.failed[server] = 0
            twin.ready[server] = ready
    assert {name: state["in_flight"] for name, state in balancer.states().items()} == twin.in_flight
    assert balancer.any_ready() == any(twin.ready.values())


def test_only_the_prefixes_of_a_lost_server_move():
    balancer = LoadBalancer(NAMES, "prefix")
    prefixes = [f"conversation {i}" for i in range(300)]
    before = {p: balancer.get_server(p) for p in prefixes}
    assert min(collections.Counter(before.values()).values()) > 60  # they are spread
    balancer.set_ready("b:2", False)
    after = {p: balancer.get_server(p) for p in prefixes}
    assert all(after[p] == before[p] for p in prefixes if before[p] != "b:2")
    assert {after[p] for p in prefixes if before[p] == "b:2"} == {"a:1", "c:3"}
    balancer.set_ready("b:2", True)
    assert {p: balancer.get_server(p) for p in prefixes} == before


def test_a_popular_prefix_makes_no_hot_spot():
    balancer = LoadBalancer(NAMES, "prefix")
    for count in range(1, 61):
        balancer.take("everybody asks this")
        most = max(state["in_flight"] for state in balancer.states().values())
        assert most <= math.ceil(SPARE * count / 3)


# ---- the command line ----


def test_a_taken_port_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        command = [sys.executable, load_balancer.__file__, "--servers", "a:1", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: cannot listen on 127.0.0.1:")


def test_random_weights_are_refused_with_a_reason(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["load_balancer.py", "--fake-replicas", "--dummy-weights", "tiny-llama"])
    with pytest.raises(SystemExit) as stopped:
        load_balancer.main()
    assert stopped.value.code == 2 and "the lab sends text: use --model" in capsys.readouterr().err


# ---- the lab ----


@pytest.mark.slow
def test_the_lab(quick_run):
    """Nothing is lost behind the gateway, whatever happens to a replica, and whoever is cut off is told."""
    done = quick_run("python3", "ch16/load_balancer.py", "--quick")
    assert done.status == 0, done.err[-3000:]
    one, plain, gateway = done.json["tables"]["outcomes"]["rows"]
    assert gateway["lost"] == gateway["duplicated"] == gateway["cut off, not told"] == 0
    assert gateway["answered"] + gateway["cut off, told"] == gateway["sent"] > 100
    assert one["lost"] > 0 and plain["lost"] > 0
    assert [row["lost"] for row in done.json["tables"]["faults"]["rows"]] == [0, 0, 0]
    assert all(row["back_s"] is not None for row in done.json["tables"]["faults"]["rows"])
    assert "simulated" in done.out and done.json["claims"][0]["verdict"] == "holds"
