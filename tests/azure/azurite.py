"""Azurite, the storage emulator, as a process of its own; and page blobs to be filled and scribbled on.

Not here: what it answers wrongly; `diff_proxy.py` stands in front of it and sets that right.
"""

import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from azure.storage.blob import BlobClient, BlobServiceClient

ACCOUNT = "devstoreaccount1"
# The emulator's own, published key: it guards nothing.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
BOUND_S = 60.0
PUT_BYTES = 4 * 1024 * 1024

_LISTENS = re.compile(rb"successfully listens on (http://127\.0\.0\.1:\d+)")


@dataclass(frozen=True, slots=True)
class Emulator:
    """An emulator that listens. `url`: of its account."""

    url: str

    @property
    def connection_string(self) -> str:
        return connection_string(self.url)

    @property
    def service(self) -> BlobServiceClient:
        """The SDK's blocking client, for what a test does behind the product's back; to be closed."""
        return BlobServiceClient.from_connection_string(self.connection_string)


def connection_string(url: str) -> str:
    """For an account at this URL, the emulator's or a proxy's."""
    protocol = url.partition(":")[0]
    return f"DefaultEndpointsProtocol={protocol};AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={url};"


@contextmanager
def azurite(folder: Path) -> Iterator[Emulator]:
    """An emulator on a free port of loopback for the time of a block; its content goes with it."""
    program = shutil.which("azurite-blob")
    assert program is not None
    command = (
        program, "--silent", "--disableTelemetry", "--skipApiVersionCheck", "--inMemoryPersistence",
        "--blobPort", "0",
    )  # fmt: skip
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield Emulator(f"{_address(process)}/{ACCOUNT}")
    finally:
        process.send_signal(signal.SIGKILL)  # it keeps nothing, and waits long for open connections
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _address(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    said = b""
    deadline = time.monotonic() + BOUND_S
    while (found := _LISTENS.search(said)) is None:
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        got = os.read(process.stdout.fileno(), 65536) if ready else b""
        assert got, f"azurite does not listen: {said.decode(errors='replace')}"
        said += got
    return found[1].decode()


@dataclass(frozen=True, slots=True)
class Disk:
    """A page blob of a test, written to by the SDK's blocking client."""

    blob: BlobClient
    address: str

    def write(self, offset: int, data: bytes) -> None:
        for start in range(0, len(data), PUT_BYTES):
            part = data[start : start + PUT_BYTES]
            self.blob.upload_page(part, offset + start, len(part))

    def clear(self, offset: int, length: int) -> None:
        self.blob.clear_page(offset, length)

    def snapshots(self) -> list[str]:
        """Ids of all its snapshots, whoever took them."""
        name = self.blob.blob_name
        container = self.blob._get_container_client()  # type: ignore[attr-defined,unused-ignore]
        found = container.list_blobs(name_starts_with=name, include=["snapshots"])
        return [item.snapshot for item in found if item.snapshot and item.name == name]


def make_disk(service: BlobServiceClient, container: str, name: str, size: int, tail: bytes = b"") -> Disk:
    """A page blob of zeros with something behind the disk, such as a footer."""
    blob = service.get_blob_client(container, name)
    blob.create_page_blob(size + len(tail))
    disk = Disk(blob, f"azure://{ACCOUNT}/{container}/{name}")
    if tail:
        disk.write(size, tail)
    return disk
