"""A reverse proxy in front of Azurite that answers what Azurite cannot: Get Page Ranges with `prevsnapshot`.

`python -m tests.azure.diff_proxy UPSTREAM_URL CONNECTION_STRING` prints its own URL and serves until stdin
ends. Everything else is passed on. `POST /-/ MODE` picks how a diff is answered; `GET /-/` tells what was
asked:

    diff     as Azure does: the pages that differ, and those that were cleared
    409 501  refused
    whole    the whole list of pages and none cleared, which is what Azurite itself does

`POST /-/ throttle=N` answers every N-th read of a range with 503 and `Retry-After: 0`; `cut=N` breaks every
N-th of them off in the middle; `page=N` tells at most N ranges of a diff at a time, as Azure does at 10,000.
0 ends it.

A managed disk's diff names the older snapshot by its URL, in a header: it is the same blob's snapshot here.
"""

import asyncio
import json
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from aiohttp import ClientSession, web
from azure.storage.blob.aio import BlobServiceClient
from yarl import URL

from tests.azure.azurite import Emulator, connection_string
from tests.house.tree import ROOT

UNIT = 4096
HOP = {"connection", "host", "keep-alive", "transfer-encoding", "content-length"}
MODES = {"diff", "409", "501", "whole"}


class Proxy:
    """One upstream, one mode, and counts of what was asked."""

    def __init__(self, upstream: str, connection: str, session: ClientSession) -> None:
        self._origin = upstream.rstrip("/").rpartition("/")[0]
        self._connection = connection
        self._session = session
        self.mode = "diff"
        self._every = {"throttle": 0, "cut": 0, "page": 0}
        self._asked: Counter[str] = Counter()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/-/":
            return await self._control(request)
        kind = _kind(request)
        self._asked[kind] += 1
        if kind == "diff" and self.mode != "whole":
            return await self._diff(request)
        if kind == "read" and self._is_turn("throttle"):
            self._asked["throttled"] += 1
            return web.Response(status=503, headers={"Retry-After": "0", "x-ms-error-code": "ServerBusy"})
        return await self._pass_on(request, cut=kind == "read" and self._is_turn("cut"))

    def _is_turn(self, what: str) -> bool:
        every = self._every[what]
        return every > 0 and self._asked["read"] % every == 0

    async def _control(self, request: web.Request) -> web.Response:
        if request.method == "POST":
            wish = (await request.text()).strip()
            name, _, number = wish.partition("=")
            if number:
                self._every[name] = int(number)
            else:
                assert wish in MODES, wish
                self.mode = wish
            self._asked.clear()
        return web.json_response(dict(self._asked))

    async def _pass_on(self, request: web.Request, cut: bool) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP}
        url = f"{self._origin}{request.raw_path}"
        body = await request.read()
        async with self._session.request(
            # As it came: a signature is over the path as it is written.
            request.method,
            URL(url, encoded=True),
            headers=headers,
            data=body or None,
            skip_auto_headers=("Content-Type",),  # it is signed, too
            allow_redirects=False,
        ) as found:
            kept = {name: value for name, value in found.headers.items() if name.lower() not in HOP}
            content = await found.read()
            answer = web.StreamResponse(status=found.status, headers=kept)
            if request.method == "HEAD":
                answer.content_length = int(found.headers.get("Content-Length", 0))
            else:
                answer.content_length = len(content)
            await answer.prepare(request)
            if request.method != "HEAD":
                await answer.write(content[: len(content) // 2] if cut else content)
            if cut and request.transport is not None:
                self._asked["cut"] += 1
                request.transport.close()
            return answer

    async def _diff(self, request: web.Request) -> web.Response:
        if self.mode != "diff":
            code = "PreviousSnapshotNotFound" if self.mode == "409" else "NotImplemented"
            return web.Response(status=int(self.mode), headers={"x-ms-error-code": code})
        _, _, container, blob = request.path.split("/", maxsplit=3)
        async with BlobServiceClient.from_connection_string(self._connection) as service:
            old, new = [
                await _content(service, container, blob, snapshot)
                for snapshot in (_previous(request), request.query.get("snapshot"))
            ]
        if old is None or new is None:
            return web.Response(status=409, headers={"x-ms-error-code": "PreviousSnapshotNotFound"})
        text = _page_list(old, new, int(request.query.get("marker", 0)), self._every["page"])
        return web.Response(text=text, content_type="application/xml")


def _previous(request: web.Request) -> str | None:
    """The older snapshot that a diff is wanted to; None if it is none that is wanted."""
    url = request.headers.get("x-ms-previous-snapshot-url")
    return URL(url).query.get("snapshot") if url else request.query.get("prevsnapshot")


def _kind(request: web.Request) -> str:
    if request.query.get("comp") == "pagelist":
        return "diff" if _previous(request) else "ranges"
    if request.query.get("comp") == "snapshot":
        return "snapshot"
    if request.method == "GET" and "comp" not in request.query and "restype" not in request.query:
        return "read"
    return request.method.lower()


Content = tuple[bytes, list[tuple[int, int]]]


async def _content(
    service: BlobServiceClient, container: str, blob: str, snapshot: str | None
) -> Content | None:
    client = service.get_blob_client(container, blob, snapshot=snapshot)
    if not await client.exists():
        return None
    stream = await client.download_blob()
    ranges = [(page["start"], page["end"] + 1) async for page in client.list_page_ranges()]
    return await stream.readall(), ranges


def _page_list(old: Content, new: Content, first: int, most: int) -> str:
    """What differs in units of 4 KiB, by whether the new snapshot has pages there."""
    held = set().union(*(range(start // UNIT, -(-end // UNIT)) for start, end in new[1]))
    before = set().union(*(range(start // UNIT, -(-end // UNIT)) for start, end in old[1]))
    size, parts = len(new[0]), []
    for unit in sorted(held | before):
        start, end = unit * UNIT, min((unit + 1) * UNIT, size)
        if unit not in held:
            parts.append(_part("ClearRange", start, end))
        elif unit not in before or old[0][start:end] != new[0][start:end]:
            parts.append(_part("PageRange", start, end))
    more = first + most if most and first + most < len(parts) else ""
    told = "".join(parts[first : first + most] if most else parts[first:])
    return f'<?xml version="1.0" encoding="utf-8"?><PageList>{told}<NextMarker>{more}</NextMarker></PageList>'


def _part(kind: str, start: int, end: int) -> str:
    return f"<{kind}><Start>{start}</Start><End>{end - 1}</End></{kind}>"


@dataclass(frozen=True, slots=True)
class RunningProxy:
    """A proxy that listens. `url`: of the account behind it; `emulator`: what it stands in front of."""

    url: str
    emulator: Emulator

    @property
    def connection_string(self) -> str:
        return connection_string(self.url)

    def set(self, wish: str) -> None:
        """A mode, or `throttle=N`, or `cut=N`; the counts begin again."""
        with urllib.request.urlopen(self._control, data=wish.encode()):
            pass

    def asked(self) -> dict[str, int]:
        """How often what was asked since the last `set`."""
        with urllib.request.urlopen(self._control) as answer:
            found: dict[str, int] = json.load(answer)
        return found

    @property
    def _control(self) -> str:
        return f"{self.url.rpartition('/')[0]}/-/"


@contextmanager
def diff_proxy(emulator: Emulator) -> Iterator[RunningProxy]:
    """A proxy as a process of its own for the time of a block."""
    command = (sys.executable, "-m", "tests.azure.diff_proxy", emulator.url, emulator.connection_string)
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield RunningProxy(process.stdout.readline().decode().strip(), emulator)
        finally:
            process.kill()


async def main(upstream: str, connection: str) -> None:
    loop = asyncio.get_running_loop()
    async with ClientSession(auto_decompress=False) as session:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_route("*", "/{path:.*}", Proxy(upstream, connection, session).answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        print(f"http://{host}:{port}/{upstream.rstrip('/').rpartition('/')[2]}", flush=True)
        ended = asyncio.Event()
        loop.add_reader(sys.stdin.fileno(), ended.set)
        await ended.wait()
        await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
