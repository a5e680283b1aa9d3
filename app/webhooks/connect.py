"""Calls to addresses that a tenant chose, which must not become calls into our own network (SSRF).

A name is resolved once, every address it stands for is checked, the connection goes to a checked address, and the peer of
the connected socket is checked again. So a name that changes its address between two looks (DNS rebinding) gains nothing.
Redirects are not followed, and proxies of the environment are not used.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

import httpcore2

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

MAX_ANSWER_BYTES = 64 << 10
_CARRIES_IPV4 = (IPv6Network("64:ff9b::/96"), IPv6Network("::/96"))  # NAT64, and the old IPv4-compatible addresses
_MAX_URL = 2_000


class RefusedError(Exception):
    """The address may not be called; says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back; the body is read to its end or its limit and dropped."""

    status: int
    headers: Mapping[str, str]


def check_url(url: str, *, allow_http: bool, allowed: Iterable[Network]) -> None:
    """Raise RefusedError for a URL that can be refused without asking anybody; its name is checked when it is called."""
    if len(url) > _MAX_URL or not url.isascii() or any(character <= " " or character in "\\\x7f" for character in url):
        raise RefusedError("it is too long, or holds spaces or characters that a URL does not have")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise RefusedError("it is no URL") from error
    if parts.scheme != "https" and not (allow_http and parts.scheme == "http"):
        raise RefusedError("it must begin with https://")
    if parts.username is not None or parts.password is not None:
        raise RefusedError("it must not hold a user or a password")
    if not parts.hostname or parts.fragment:
        raise RefusedError("it must name a host, and no fragment")
    if port is not None and port not in {80, 443} and port < 1024:
        raise RefusedError(f"port {port} belongs to another kind of service")
    for address in _literal(parts.hostname):
        check_address(address, allowed)


def check_address(text: str, allowed: Iterable[Network]) -> None:
    """Raise RefusedError unless the address is public or lies in one of the networks that the operator allows."""
    address = ip_address(text.partition("%")[0])
    if not (is_public(address) or any(address in network for network in allowed)):
        raise RefusedError(f"{address} is not a public address")


def is_public(address: Address) -> bool:
    """Whether an address, and the IPv4 address that it may carry inside, belongs to the public internet."""
    if isinstance(address, IPv6Address):
        carried = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if any(address in network for network in _CARRIES_IPV4):
            carried = IPv4Address(int(address) & 0xFFFFFFFF)
        if carried is not None and not is_public(carried):
            return False
        if address.is_site_local:
            return False
        if address.ipv4_mapped:
            return True
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _literal(host: str) -> Sequence[str]:
    """The addresses that a host stands for without a name server: `127.1` and `0x7f000001` are addresses, too."""
    try:
        found = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(entry[4][0]) for entry in found]


async def resolve(host: str, port: int) -> Sequence[str]:
    """All addresses of a host, as the system's resolver tells them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class GuardedBackend(httpcore2.AsyncNetworkBackend):
    """Connects to checked addresses only. `inner` makes the connections."""

    def __init__(
        self, allowed: Iterable[Network], *, resolve: Resolve = resolve, inner: httpcore2.AsyncNetworkBackend | None = None
    ) -> None:
        self._allowed = tuple(allowed)
        self._resolve = resolve
        self._inner = inner or httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 (the name in the class above)
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Raises RefusedError if any address of `host`, or the peer that answers, may not be called."""
        try:
            addresses = await self._resolve(host.strip("[]"), port)
        except OSError as error:
            raise httpcore2.ConnectError(f"{host} cannot be resolved") from error
        for address in addresses:
            check_address(address, self._allowed)
        problem: Exception = httpcore2.ConnectError(f"{host} has no address")
        for address in addresses:
            try:
                stream = await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                problem = error
                continue
            try:
                check_address(str(stream.get_extra_info("server_addr")[0]), self._allowed)
            except RefusedError:
                await stream.aclose()
                raise
            return stream
        raise problem

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


async def post(
    url: str, body: bytes, headers: Mapping[str, str], *, backend: httpcore2.AsyncNetworkBackend, seconds: float
) -> Answer:
    """Send a POST. Raises RefusedError, TimeoutError, or an error of httpcore2 or ssl if there is no answer in time."""
    async with (
        asyncio.timeout(seconds),
        httpcore2.AsyncConnectionPool(network_backend=backend) as pool,
        pool.stream("POST", url, headers=list(headers.items()), content=body) as response,
    ):
        received = 0
        async for piece in response.aiter_stream():
            received += len(piece)
            if received > MAX_ANSWER_BYTES:
                break
        return Answer(
            response.status, {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
        )
