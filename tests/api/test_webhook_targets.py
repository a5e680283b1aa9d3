"""The connection that webhooks are sent over: where it never leads (SSRF), what it trusts, and what it reads."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpcore2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from app.kit import clock
from app.webhooks import connect
from app.webhooks.connect import GuardedBackend, RefusedError

LOOPBACK = (ip_network("127.0.0.0/8"),)

TARGETS = [
    "http://example.com/",
    "ftp://example.com/",
    "https://user:password@example.com/",
    "https://example.com:22/",
    "https://exa mple.com/",
    "https:///nothing",
    "https://127.0.0.1/",
    "https://127.1/",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0177.0.0.1/",
    "https://0.0.0.0/",
    "https://10.1.2.3/",
    "https://172.16.0.1/",
    "https://192.168.1.1/",
    "https://169.254.169.254/latest/meta-data/",
    "https://100.64.0.1/",
    "https://[::1]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::127.0.0.1]/",
    "https://[fd00::1]/",
    "https://[fe80::1]/",
    "https://[fec0::1]/",
    "https://[64:ff9b::7f00:1]/",
    "https://[2002:7f00:1::]/",
    "https://224.0.0.1/",
    "https://255.255.255.255/",
]


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_inside_is_refused_when_it_is_given(target: str) -> None:
    with pytest.raises(RefusedError):
        connect.check_url(target, allow_http=False, allowed=())
    connect.check_url("https://example.com:8443/a?b=c", allow_http=False, allowed=())
    connect.check_url("https://[2606:4700::1111]/", allow_http=False, allowed=())


class Resolver:
    """Answers with one list of addresses after the other."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)

    async def __call__(self, _host: str, _port: int) -> Sequence[str]:
        return self.answers.pop(0)


class Detour(httpcore2.AnyIOBackend):
    """A network whose connections all end on loopback, wherever they were to go, as behind a treacherous gateway."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port, self.connected = port, 0

    async def connect_tcp(self, *_: Any, **__: Any) -> httpcore2.AsyncNetworkStream:
        self.connected += 1
        return await super().connect_tcp("127.0.0.1", self.port)


@pytest.fixture
async def counted() -> AsyncIterator[tuple[int, list[int]]]:
    """A port of loopback, and the lengths of what was sent to it."""
    lengths: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lengths.append(len(await reader.read(1024)))
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], lengths


async def post(url: str, backend: GuardedBackend) -> connect.Answer:
    return await connect.post(url, b"{}", {}, backend=backend, seconds=5)


async def test_a_name_that_leads_inside_is_refused_before_a_connection(counted: tuple[int, list[int]]) -> None:
    port, sent = counted
    for addresses in (["127.0.0.1"], ["93.184.216.34", "127.0.0.1"], ["::ffff:10.0.0.1"], ["169.254.169.254"]):
        inner = Detour(port)
        with pytest.raises(RefusedError):
            await post(f"http://inside.example:{port}/", GuardedBackend((), resolve=Resolver(addresses), inner=inner))
        assert inner.connected == 0
    with pytest.raises(RefusedError):  # by the real resolver
        await post(f"http://localhost:{port}/", GuardedBackend(()))
    assert sent == []


async def test_a_name_that_changes_its_address_between_two_looks_is_refused(counted: tuple[int, list[int]]) -> None:
    """DNS rebinding: public at the first try, loopback at the second."""
    port, sent = counted
    backend = GuardedBackend((), resolve=Resolver(["93.184.216.34"], ["127.0.0.1"]), inner=Detour(port))
    # The name was public, but who answered is not: the socket's peer is looked at, too.
    with pytest.raises(RefusedError, match=r"127\.0\.0\.1"):
        await post("http://rebinding.example/", backend)
    with pytest.raises(RefusedError, match=r"127\.0\.0\.1"):
        await post("http://rebinding.example/", backend)
    assert sent in ([], [0], [0, 0])


async def test_a_certificate_that_nobody_trusts_gets_nothing(tmp_path: Path) -> None:
    got: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.read(1024))
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(_self_signed(tmp_path / "certificate.pem"))
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        with pytest.raises((httpcore2.ConnectError, ssl.SSLError), match="certificate"):
            await post(f"https://localhost:{server.sockets[0].getsockname()[1]}/", GuardedBackend(LOOPBACK))
    assert got in ([], [b""])


def _self_signed(file: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(clock.now() - timedelta(days=1)).not_valid_after(clock.now() + timedelta(days=1))
    certificate = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.write_bytes(private + certificate.sign(key, SHA256()).public_bytes(Encoding.PEM))
    return file


async def test_an_answer_without_end_is_cut_off() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while True:
                writer.write(bytes(65536))
                await writer.drain()
        except ConnectionError:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        answer = await post(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", GuardedBackend(LOOPBACK))
    assert replace(answer, headers={}) == connect.Answer(200, {})
