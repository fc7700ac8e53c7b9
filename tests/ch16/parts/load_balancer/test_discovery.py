"""Servers that come and go: the name, the balancer, and the gateway in between."""

import asyncio
import os
import signal
import socket
import sys
from types import SimpleNamespace

import aiohttp
import pytest
import requests
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from ch16.load_balancer import POLICIES, LoadBalancer
from ch16.parts.load_balancer.breaker import NoServer
from ch16.parts.load_balancer.flags import addresses
from ch16.parts.load_balancer.gateway import Gateway, GatewayLimits
from common.server import ServerProcess, listen
from common.standin import standin_command
from tests.servers import ROOT

SCRIPT = str(ROOT / "ch16" / "load_balancer.py")


# ---- the name ----


def resolve(monkeypatch, answer):
    async def getaddrinfo(name, port, *, type):
        if isinstance(answer, Exception):
            raise answer
        return [(family, type, 6, "", (ip, port)) for family, ip in answer]

    async def ask():
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
        return await addresses("inference-server", 8000)

    return asyncio.run(ask())


def test_every_address_of_a_name_is_a_server(monkeypatch):
    v4, v6 = socket.AF_INET, socket.AF_INET6
    assert resolve(monkeypatch, [(v4, "10.0.0.1"), (v4, "10.0.0.2")]) == {"10.0.0.1:8000", "10.0.0.2:8000"}
    assert resolve(monkeypatch, [(v6, "fd00::1")]) == {"[fd00::1]:8000"}
    assert resolve(monkeypatch, [(v4, "10.0.0.1"), (v6, "fd00::1")]) == {"10.0.0.1:8000"}, "one pod, one server"


@pytest.mark.parametrize("error", [socket.gaierror(-2, "not known"), OSError("no network"), UnicodeError("too long")])
def test_a_name_that_does_not_resolve(monkeypatch, error):
    assert resolve(monkeypatch, error) is None


# ---- the balancer ----


@given(st.sampled_from(POLICIES), st.lists(st.tuples(st.sampled_from("+-ror!"), st.sampled_from("abcd"))))
def test_a_balancer_whose_servers_change(policy, steps):
    """Against a plain account of who is there, ready, and at work."""
    balancer, ready, leases = LoadBalancer((), policy), {}, []
    in_flight = {}
    for step, name in steps:
        if step == "+" and name not in ready:
            balancer.add(name)
            ready[name], in_flight[name] = False, 0
        elif step == "-" and name in ready:
            balancer.remove(name)
            del ready[name], in_flight[name]
            leases = [(lease, other, False) if other == name else (lease, other, here) for lease, other, here in leases]
        elif step == "r" and name in ready:
            ready[name] = True
            balancer.set_ready(name, True)
        elif step == "o":
            try:
                lease = balancer.take("prefix")
            except NoServer:
                assert not any(ready.values())
            else:
                assert ready[lease.server]
                in_flight[lease.server] += 1
                leases.append((lease, lease.server, True))
        elif step == "!" and leases:
            lease, server, here = leases.pop()
            balancer.give_back(lease, True)
            if here:  # what came back to a server of the same name, long gone, is not counted
                in_flight[server] -= 1
        assert {name: state["in_flight"] for name, state in balancer.states().items()} == in_flight
        assert set(balancer.servers) == set(ready) and balancer.any_ready() == any(ready.values())


def test_each_server_once():
    balancer = LoadBalancer(["a:1"])
    with pytest.raises(ValueError, match="once"):
        balancer.add("a:1")


# ---- the gateway ----


async def replica(name):
    """A server that says its name."""

    async def handle(request):
        return web.json_response({"name": name})

    server = web.ServerRunner(web.Server(handle), shutdown_timeout=0)
    await server.setup()
    await web.SockSite(server, listener := listen("127.0.0.1", 0)).start()
    return SimpleNamespace(runner=server, address=f"127.0.0.1:{listener.getsockname()[1]}")


def test_the_gateway_follows_the_servers(monkeypatch):
    monkeypatch.setattr("gc.freeze", lambda: None)  # this process goes on
    there: dict = {"found": None}

    async def find():
        return there["found"]

    async def main():
        limits = GatewayLimits(check_s=0.02, find_s=0.02)
        gateway, listener = Gateway(LoadBalancer(()), limits, find=find), listen("127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.listen()  # what comes before the gateway does waits
        running = asyncio.create_task(gateway.run(listener))
        one, two = await replica("one"), await replica("two")
        async with aiohttp.ClientSession() as session:

            async def answers():
                """Who answers the next few requests; None: nobody can."""
                names = set()
                for _ in range(4):
                    async with session.post(f"{url}/v1/completions", json={}) as answer:
                        names.add((await answer.json()).get("name") if answer.status == 200 else None)
                return names

            async def by(*names):
                async with asyncio.timeout(20):
                    while await answers() != set(names):
                        await asyncio.sleep(0.01)

            await by(None)  # it starts without servers, and says so
            there["found"] = {one.address}
            await by("one")
            there["found"] = {one.address, two.address}
            await by("one", "two")
            there["found"] = None  # the resolver fails: nothing changes
            await asyncio.sleep(0.1)
            assert await answers() == {"one", "two"}
            there["found"] = {two.address}  # `one` answers still, but is on its way out
            await by("two")
            async with session.get(f"{url}/metrics") as answer:
                assert one.address not in (page := await answer.text()) and two.address in page
            there["found"] = {one.address, two.address}  # the same address again
            await by("one", "two")
            there["found"] = set()
            await by(None)
        os.kill(os.getpid(), signal.SIGINT)
        await running
        for server in (one, two):
            await server.runner.cleanup()

    asyncio.run(main())


@pytest.mark.slow
def test_the_command_line(tmp_path):
    """A name that is an address, and one that nobody has: the gateway starts, and is not ready."""
    with ServerProcess(standin_command(), tmp_path) as server:
        command = [sys.executable, SCRIPT, "--discover", server.address]
        with ServerProcess(command, tmp_path) as gateway:
            assert f"for {server.address}" in gateway.log.read_text()
    nobody = ServerProcess([sys.executable, SCRIPT, "--discover", "nobody.invalid:8000"], tmp_path).start()
    try:
        nobody.wait_ready("/health")
        assert requests.get(nobody.url + "/ready", timeout=5).status_code == 503
        assert nobody.stop(signal.SIGTERM) == 0
    finally:
        nobody.stop()
