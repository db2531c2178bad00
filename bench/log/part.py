"""The part ``log`` of the benchmark: its five measurements, each in a folder that goes with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.contenders import Ends
from bench.errors import BenchError
from bench.log import applying, known, many, starting, vast
from bench.log.figures import Figure
from bench.namespaces import HostNetwork, free_port
from bench.options import LogSizes
from bench.processes import CutOff, RunFailed
from bench.runs import LOOPBACK
from replicator.errors import ReplicatorError


def measure(
    image: Callable[[], Path], sizes: LogSizes, seed: int, folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """All figures, and what failed; ``image`` gives the disk of which known blocks change."""
    room = folder / "log"

    def on(work: Callable[..., list[Figure]]) -> list[Figure]:
        network = HostNetwork()
        return work(sizes, seed, room, Ends(network, network, LOOPBACK, free_port()), say)

    works: Mapping[str, Callable[[], list[Figure]]] = {
        "known changes": lambda: on(
            lambda sizes, seed, room, ends, say: known.measure(image(), sizes, seed, room, ends, say)
        ),
        "applying": lambda: applying.measure(sizes, seed, room, say),
        "vast disks": lambda: on(vast.measure),
        "many disks": lambda: on(many.measure),
        "starting": lambda: on(starting.measure),
    }
    figures: list[dict[str, Any]] = []
    failed = []
    for name, work in works.items():
        try:
            figures += [figure.document() for figure in work()]
        except (
            BenchError,
            RunFailed,
            CutOff,
            ReplicatorError,
        ) as error:  # what others found shall not be lost
            failed.append(f"nothing came of {name}: {error}")
            say(failed[-1])
        finally:
            shutil.rmtree(room, ignore_errors=True)
    return {"figures": figures, "failed": failed}
