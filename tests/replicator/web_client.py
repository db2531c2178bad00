"""A client of HTTP by hand: what it sends, and when, is the test's own."""

import asyncio
import json
import ssl
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from replicator.transport.dial import Address
from tests.replicator.pipeline import HANGS_S


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


class WebClient:
    """A connection that speaks HTTP."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def dial(cls, address: Address, context: ssl.SSLContext, name: str) -> Self:
        return cls(*await asyncio.open_connection(*address, ssl=context, server_hostname=name))

    def ask(self, path: str) -> None:
        self.writer.write(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())

    async def answer(self) -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {
            key.lower(): value for key, _, value in (line.partition(": ") for line in head[1:] if line)
        }
        body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        return Answer(int(head[0].split()[1]), headers, body)

    async def get(self, path: str) -> Answer:
        self.ask(path)
        return await self.answer()

    async def closed(self) -> None:
        """The other side has ended the connection, and sent nothing more."""
        with suppress(ConnectionError):
            assert await self.reader.read(1) == b""

    def close(self) -> None:
        self.writer.transport.abort()


async def get(address: Address, context: ssl.SSLContext, name: str, path: str) -> Answer:
    """One request on a connection of its own."""
    async with asyncio.timeout(HANGS_S):
        client = await WebClient.dial(address, context, name)
        try:
            return await client.get(path)
        finally:
            client.close()


def with_alpn(context: ssl.SSLContext, *names: str) -> ssl.SSLContext:
    """The same context, for these conversations."""
    context.set_alpn_protocols(list(names))
    return context


def without_alpn(authority: bytes) -> ssl.SSLContext:
    """As a client that knows nothing of ALPN, shows nothing, and trusts the authority (DER)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority)
    return context
