"""The gateway's command line, and the look-up of its servers.

In Kubernetes a headless Service is a name with the address of every pod.
"""

import argparse
import asyncio
import functools
import logging
import os
import socket
from collections.abc import Sequence

from ch16.parts.load_balancer.gateway import Balancer, Gateway, GatewayLimits
from common import cli
from common.server import listen

LIMITS = (
    ("--retries", "retries", cli.non_negative_int, "RETRIES", "more servers to try"),
    ("--first-byte-timeout", "first_byte_s", cli.positive_float, "S", "for the first byte of an answer"),
    ("--idle-timeout", "idle_s", cli.positive_float, "S", "between two parts of an answer"),
    ("--request-timeout", "request_s", cli.positive_float, "S", "for a client to send its request"),
    ("--check-interval", "check_s", cli.positive_float, "S", "between two checks of a server"),
    ("--drain-timeout", "drain_s", cli.positive_float, "S", "after SIGTERM, for requests in flight"),
    ("--max-body-bytes", "max_body_bytes", cli.positive_int, "MAX_BODY_BYTES", "then 413"),
)


def gateway_flags(parser: argparse.ArgumentParser, policies: Sequence[str]) -> None:
    """Add the flags that `serve` reads."""
    gateway = parser.add_argument_group("gateway")
    servers = gateway.add_mutually_exclusive_group()
    servers.add_argument("--servers", type=server_list, metavar="HOST:PORT,...", help="run the gateway for these")
    look_up = "run it for all addresses of a name, as they change"
    servers.add_argument("--discover", type=name_and_port, metavar="NAME:PORT", help=look_up)
    gateway.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines")
    gateway.add_argument("--port", type=int, default=9000, help="where it listens")
    which = "which server takes the next request"
    gateway.add_argument("--policy", choices=policies, default="least-in-flight", help=which)
    gateway.add_argument("--api-key", default="", help="clients must send it; or GATEWAY_API_KEY")
    gateway.add_argument("--server-key", default="", help="sent to the servers; or VLLM_API_KEY")
    gateway.add_argument("--ready-path", default="/ready", help="200 there: takes requests; /health for a plain vLLM")
    for flag, limit, kind, metavar, what in LIMITS:
        default = getattr(GatewayLimits, limit)
        gateway.add_argument(flag, dest=limit, type=kind, default=default, metavar=metavar, help=what)


async def addresses(name: str, port: int) -> set[str] | None:
    """Each address that a name has now, as `address:port`; None if it does not resolve: keep the servers known so far.

    A pod with IPv4 and IPv6 is one server: only the family of the resolver's first address counts.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # UnicodeError: no valid name
        return None
    first = found[0][0]
    ips = {address[0] for family, *_, address in found if family == first}
    return {f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}" for ip in ips}


def serve(args: argparse.Namespace, balancer: Balancer) -> int:
    """Run the gateway until a signal."""
    import uvloop

    limits = GatewayLimits(**{limit: getattr(args, limit) for _, limit, *_ in LIMITS})
    key = args.api_key or os.environ.get("GATEWAY_API_KEY", "")
    server_key = args.server_key or os.environ.get("VLLM_API_KEY", "")
    find = functools.partial(addresses, *args.discover) if args.discover else None
    gateway = Gateway(balancer, limits, key, server_key, args.ready_path, find)
    listener = listen(args.host, args.port)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # no traceback for every malformed request
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
    """argparse type: one name:port."""
    servers = server_list(text)
    if len(servers) > 1:
        raise argparse.ArgumentTypeError(f"'{text}' is more than one name")
    name, _, port = servers[0].rpartition(":")
    return name, int(port)
