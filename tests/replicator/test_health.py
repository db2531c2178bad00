"""What daemons tell of themselves, and to whom: walked route by route."""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from agents.master_target import identify
from replicator import __version__, health
from replicator.certificates import ServerKind
from replicator.clock import Clock
from replicator.errors import LinkError, TrustError
from replicator.health import Identify, Problem, Readiness, Told
from replicator.transport import tls
from replicator.transport.accept import Acceptor
from replicator.transport.web import WebServer
from tests.replicator.pipeline import HANGS_S, LOOPBACK, Site
from tests.replicator.web_client import Answer, get, with_alpn, without_alpn

ROUTES = ("/healthz", "/readyz", "/metrics")
SINCE = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
PROBLEM = Problem("web", "link.lost", "gone", "the network", "wait", SINCE)


class Daemon:
    """Something with health."""

    def __init__(self, path: Path) -> None:
        self.site = Site(path)
        own = self.site.authority.own_credentials(ServerKind.MASTER_TARGET, Clock().now())
        self.context = tls.server_context(own, self.site.authority.certificate, (tls.ALPN_HTTP,))
        self.identify: Identify = identify
        self.ready = Readiness(True, "serving")
        told = Told(lambda: self.ready, self._metrics)
        self.app = health.application(told, self._identify)
        self.web = WebServer(self.app)
        self.acceptor = Acceptor(lambda: self.context, {}, Clock(), web=self.web.protocol)
        self.address = LOOPBACK

    def _identify(self, certificate: bytes) -> str:
        return self.identify(certificate)

    async def _metrics(self) -> Iterable[Metric]:
        return [
            health.gauge("replicator_lag_seconds", "Lag.", [({"group": 'a"b\n'}, 1.5), ({"group": "c"}, 2)]),
            health.counter("replicator_bytes", "Bytes.", [({"kind": "sent"}, 1 << 60)]),
            health.door(self.acceptor.counts),
        ]

    def somebody(self) -> ssl.SSLContext:
        return with_alpn(self.site.process_server().context, tls.ALPN_HTTP)

    def nobody(self) -> ssl.SSLContext:
        return without_alpn(self.site.authority.certificate)

    async def get(self, path: str, context: ssl.SSLContext | None = None) -> Answer:
        return await get(self.address, context or self.somebody(), self.site.name, path)


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    made = Daemon(tmp_path)
    await made.web.start()
    made.address = await made.acceptor.start(LOOPBACK)
    async with asyncio.timeout(HANGS_S):
        yield made
    await made.acceptor.stop()
    await made.web.stop()


def routes(daemon: Daemon) -> set[str]:
    return {route.resource.canonical for route in daemon.app.router.routes() if route.resource is not None}


# ------------------------------------------------------------------ who is answered


async def test_the_walk_below_knows_every_route(daemon: Daemon) -> None:
    assert routes(daemon) == set(ROUTES)
    assert {"/healthz"} == health.OPEN_ROUTES


@pytest.mark.parametrize("path", [*ROUTES, "/", "/healthz/", "/healthz/../metrics", "//metrics", "/nothing"])
async def test_without_an_identity_only_life_is_told(daemon: Daemon, path: str) -> None:
    answer = await daemon.get(path, daemon.nobody())
    if path == "/healthz":
        assert (answer.status, answer.body) == (200, b"alive\n")
        return
    assert answer.status == 401
    assert answer.headers["content-type"].startswith("application/problem+json")
    assert answer.document["code"] == "identity.required"
    assert all(answer.document[key] for key in ("title", "cause", "fix"))


@pytest.mark.parametrize("path", ROUTES)
async def test_with_a_certificate_all_is_told(daemon: Daemon, path: str) -> None:
    assert (await daemon.get(path)).status == 200


@pytest.mark.parametrize("path", ROUTES[1:])
async def test_whom_we_do_not_accept_is_told_nothing(daemon: Daemon, path: str) -> None:
    def revoked(_: bytes) -> str:
        raise TrustError("identity.revoked", "withdrawn", cause="an operator", fix="ask")

    daemon.identify = revoked
    answer = await daemon.get(path)
    assert (answer.status, answer.document["code"]) == (403, "identity.revoked")


@pytest.mark.parametrize("path", ROUTES[1:])
async def test_an_error_while_deciding_means_no(
    daemon: Daemon, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: bytes) -> str:
        raise OSError("the database is gone")

    daemon.identify = fails
    answer = await daemon.get(path)
    assert (answer.status, answer.document["code"]) == (403, "identity.undecided")
    assert b"is gone" not in answer.body and "database is gone" in caplog.text


async def test_a_certificate_of_another_installation_does_not_get_in(daemon: Daemon, tmp_path: Path) -> None:
    other = Site(tmp_path / "other")
    foreign = tls.client_context(other.credentials("ps-" + "0" * 32), daemon.site.authority.certificate)
    with_alpn(foreign, tls.ALPN_HTTP)
    with pytest.raises((OSError, asyncio.IncompleteReadError)):
        await daemon.get("/healthz", foreign)
    assert daemon.acceptor.counts.failed.total() == 1


async def test_only_reading_is_offered(daemon: Daemon) -> None:
    assert {route.method for route in daemon.app.router.routes()} == {"GET", "HEAD"}


# ------------------------------------------------------------------ what is told


async def test_readiness_is_told_with_its_problems(daemon: Daemon) -> None:
    assert (await daemon.get("/readyz")).document == {"ready": True, "state": "serving", "problems": []}
    daemon.ready = Readiness(False, "draining", (PROBLEM,))
    answer = await daemon.get("/readyz")
    assert answer.status == 503
    assert answer.document == {
        "ready": False,
        "state": "draining",
        "problems": [
            {
                "on": "web",
                "code": "link.lost",
                "message": "gone",
                "cause": "the network",
                "fix": "wait",
                "since": "2026-01-02T03:04:05+00:00",
            }
        ],
    }


async def test_metrics_are_what_prometheus_reads(daemon: Daemon) -> None:
    await daemon.get("/healthz", daemon.nobody())
    answer = await daemon.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }
    assert found["replicator_lag_seconds", 'a"b\n'] == 1.5
    assert found["replicator_bytes_total", "sent"] == 1 << 60
    assert found["replicator_handshakes_total", "accepted"] == 2
    assert found["replicator_build_info", __version__] == 1
    assert found["replicator_ready",] == 1
    assert found["process_open_fds",] > 0 and found["process_resident_memory_bytes",] > 1 << 20


async def test_metrics_that_cannot_be_had_are_an_error_and_no_details(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    monkeypatch.setattr(health, "exposition", lambda _: 1 / 0)
    answer = await daemon.get("/metrics")
    assert answer.status == 500 and b"Division" not in answer.body
    assert (await daemon.get("/readyz")).status == 200


def test_a_problem_says_what_its_error_says() -> None:
    error = LinkError("link.lost", "gone", cause="the network", fix="wait")
    assert Problem.of(error, "web", SINCE) == PROBLEM
