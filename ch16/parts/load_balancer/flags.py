"""The gateway's command line."""

import argparse
import functools
import logging
import os
from collections.abc import Sequence

from ch16.parts.load_balancer.discovery import addresses
from ch16.parts.load_balancer.gateway import Balancer, Gateway, GatewayLimits
from common import cli
from common.server import listen


def gateway_flags(parser: argparse.ArgumentParser, policies: Sequence[str]) -> None:
    """Add the flags that `serve` reads."""
    gateway = parser.add_argument_group("gateway")
    servers = gateway.add_mutually_exclusive_group()
    servers.add_argument("--servers", type=server_list, metavar="HOST:PORT,...", help="run the gateway for these")
    servers.add_argument(
        "--discover", type=name_and_port, metavar="NAME:PORT", help="run it for all addresses of a name, as they change"
    )
    gateway.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines")
    gateway.add_argument("--port", type=int, default=9000, help="where it listens")
    gateway.add_argument(
        "--policy", choices=policies, default="least-in-flight", help="which server takes the next request"
    )
    gateway.add_argument("--api-key", default="", help="clients must send it; or GATEWAY_API_KEY")
    gateway.add_argument("--server-key", default="", help="sent to the servers; or VLLM_API_KEY")
    gateway.add_argument("--ready-path", default="/ready", help="200 there: takes requests; /health for a plain vLLM")
    gateway.add_argument(
        "--retries", type=cli.non_negative_int, default=GatewayLimits.retries, help="more servers to try"
    )
    for flag, limit, what in (
        ("--first-byte-timeout", "first_byte_s", "for the first byte of an answer"),
        ("--idle-timeout", "idle_s", "between two parts of an answer"),
        ("--request-timeout", "request_s", "for a client to send its request"),
        ("--check-interval", "check_s", "between two checks of a server"),
        ("--drain-timeout", "drain_s", "after SIGTERM, for requests in flight"),
    ):
        gateway.add_argument(
            flag, type=cli.positive_float, default=getattr(GatewayLimits, limit), metavar="S", help=what
        )
    gateway.add_argument(
        "--max-body-bytes", type=cli.positive_int, default=GatewayLimits.max_body_bytes, help="then 413"
    )


def serve(args: argparse.Namespace, balancer: Balancer) -> int:
    """Run the gateway until a signal."""
    import uvloop

    limits = GatewayLimits(
        first_byte_s=args.first_byte_timeout,
        idle_s=args.idle_timeout,
        request_s=args.request_timeout,
        check_s=args.check_interval,
        drain_s=args.drain_timeout,
        retries=args.retries,
        max_body_bytes=args.max_body_bytes,
    )
    keys = (
        args.api_key or os.environ.get("GATEWAY_API_KEY", ""),
        args.server_key or os.environ.get("VLLM_API_KEY", ""),
    )
    find = functools.partial(addresses, *args.discover) if args.discover else None
    gateway = Gateway(balancer, limits, *keys, ready_path=args.ready_path, find=find)
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
