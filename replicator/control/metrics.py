"""What the API counts of itself, for Prometheus. What all daemons count: ``replicator/health.py``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters of one API, in a registry of their own."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self.requests = Counter(
            "replicator_api_requests",
            "Requests answered, by route and status",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "replicator_api_request_seconds",
            "Time from a request's headers to its answer",
            ("method", "route"),
            buckets=(0.005, 0.02, 0.1, 0.5, 2, 10),
            registry=self.registry,
        )
        self.streams = Gauge(
            "replicator_api_event_streams", "Streams of events that are open", registry=self.registry
        )

    def text(self) -> bytes:
        """Everything counted, in the text format."""
        return generate_latest(self.registry)
