"""What every daemon answers over HTTPS: ``/healthz`` (alive), ``/readyz`` (fit for work), ``/metrics``.

``/healthz`` answers anybody and says no more than that the event loop turns. The other two want a certificate
of the installation; an error while deciding means no. Not here: connections (``transport/web.py``), and what
the figures are (each daemon's own).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest

from replicator import __version__
from replicator.errors import ReplicatorError, TrustError
from replicator.transport.accept import Counts

log = logging.getLogger(__name__)

OPEN_ROUTES = frozenset({"/healthz"})
"""What answers without an identity."""

Identify = Callable[[bytes], str]
"""Certificate (DER, of our authority) -> identity id; raises TrustError for what is not accepted."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What stands in the way of a daemon's work. ``since``: when it was first met; ``on``: of which thing."""

    on: str
    code: str
    message: str
    cause: str
    fix: str
    since: datetime

    @classmethod
    def of(cls, error: ReplicatorError, on: str, since: datetime) -> Problem:
        """The problem that an error is."""
        return cls(on, error.code, error.message, error.cause, error.fix, since)


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether a daemon is fit for work. ``state``: one word, such as ``serving`` or ``draining``."""

    ready: bool
    state: str
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Told:
    """What a daemon tells of itself, asked anew for every request."""

    readiness: Callable[[], Readiness]
    metrics: Callable[[], Awaitable[Iterable[Metric]]]


def application(told: Told, identify: Identify) -> web.Application:
    """The application with the three routes."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def readyz(_: web.Request) -> web.Response:
        found = told.readiness()
        return web.json_response(_as_json(found), status=200 if found.ready else 503)

    async def metrics(_: web.Request) -> web.Response:
        content = exposition([*await told.metrics(), _build(), _ready(told.readiness())])
        return web.Response(body=content, headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application(middlewares=[_guard(identify)])
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    return app


def _guard(identify: Identify) -> Middleware:
    """A middleware: whatever is not open wants an identity, routes that do not exist too."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in OPEN_ROUTES:
            return await handler(request)
        tls = request.get_extra_info("ssl_object")
        certificate = tls.getpeercert(binary_form=True) if tls is not None else None
        if certificate is None:
            return refusal(_no_certificate(), 401)
        try:
            identify(certificate)
        except TrustError as error:
            return refusal(error, 403)
        except Exception:  # whatever failed while deciding: no
            log.exception("%s asked for %s, and who it is could not be decided", request.remote, request.path)
            return refusal(_undecided(), 403)
        return await handler(request)

    return guard


def refusal(error: ReplicatorError, status: int) -> web.Response:
    """An error as ``application/problem+json`` (RFC 9457), with our code, cause and fix."""
    body = {
        "type": "about:blank",
        "title": error.message,
        "status": status,
        "code": error.code,
        "cause": error.cause,
        "fix": error.fix,
    }
    return web.Response(text=json.dumps(body), status=status, content_type="application/problem+json")


def _no_certificate() -> TrustError:
    return TrustError(
        "identity.required",
        "a certificate of the installation is needed",
        cause="the request came without one",
        fix="show that of a server that has joined",
    )


def _undecided() -> TrustError:
    return TrustError(
        "identity.undecided",
        "who you are could not be decided",
        cause="the server's own files or database fail; its log says which",
        fix="put the server right, then ask again",
    )


def _as_json(found: Readiness) -> dict[str, object]:
    problems = [
        {
            "on": problem.on,
            "code": problem.code,
            "message": problem.message,
            "cause": problem.cause,
            "fix": problem.fix,
            "since": problem.since.isoformat(timespec="seconds"),
        }
        for problem in found.problems
    ]
    return {"ready": found.ready, "state": found.state, "problems": problems}


# ------------------------------------------------------------------ metrics


def exposition(metrics: Iterable[Metric]) -> bytes:
    """Metrics, and those of this process, as Prometheus reads them."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Found(tuple(metrics)))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


def gauge(name: str, text: str, samples: Iterable[tuple[dict[str, str], float]]) -> Metric:
    """A gauge with a sample for each set of labels."""
    return _with(GaugeMetricFamily(name, text), samples)


def counter(name: str, text: str, samples: Iterable[tuple[dict[str, str], float]]) -> Metric:
    """A counter; ``name`` without ``_total``, which its samples get."""
    return _with(CounterMetricFamily(name, text), samples, "_total")


def door(counts: Counts) -> Metric:
    """The handshakes of an acceptor."""
    results = {
        "accepted": counts.accepted,
        "over_budget": counts.over_budget,
        "failed": counts.failed.total(),
    }
    return counter(
        "replicator_handshakes",
        "TLS handshakes on our port since start, by how they ended.",
        [({"result": result}, number) for result, number in results.items()],
    )


def _with(family: Metric, samples: Iterable[tuple[dict[str, str], float]], suffix: str = "") -> Metric:
    for labels, value in samples:
        family.add_sample(family.name + suffix, labels, value)
    return family


def _build() -> Metric:
    return gauge("replicator_build_info", "The release that runs.", [({"version": __version__}, 1)])


def _ready(found: Readiness) -> Metric:
    return gauge("replicator_ready", "1 where /readyz says so, else 0.", [({}, float(found.ready))])


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """A collector of what was found already."""

    metrics: tuple[Metric, ...]

    def collect(self) -> Iterator[Metric]:
        yield from self.metrics
