"""Which servers are there? In Kubernetes a name says it: that of a headless Service has the address of every pod."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

Find = Callable[[], Awaitable[set[str] | None]]


async def addresses(name: str, port: int) -> set[str] | None:
    """Each address that a name has now, as `address:port`.

    A pod with addresses of both families is one server: only those of the resolver's first choice count.

    Returns:
        None if the name does not resolve: there is no server yet, or the resolver fails. In either case whoever asks
        does best to keep what it knows, and to look at each server itself.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # the latter for a name that cannot be one
        return None
    first = found[0][0]
    ips = {address[0] for family, *_, address in found if family == first}
    return {f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}" for ip in ips}
