"""Look up the servers. In Kubernetes a headless Service is a name with the address of every pod."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

Find = Callable[[], Awaitable[set[str] | None]]


async def addresses(name: str, port: int) -> set[str] | None:
    """Each address that a name has now, as `address:port`.

    A pod with IPv4 and IPv6 is one server: only the family of the resolver's first address counts.

    Returns:
        None if the name does not resolve: there is no server yet, or the resolver fails. The caller should then keep
        the servers that it knows and check each of them.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # UnicodeError: no valid name
        return None
    first = found[0][0]
    ips = {address[0] for family, *_, address in found if family == first}
    return {f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}" for ip in ips}
