"""What machine this is, as far as figures depend on it: nothing that tells whose it is or where."""

from __future__ import annotations

import os
import platform
import re
import shutil
import ssl
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash
import zstandard

from replicator import __version__

CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")
CONGESTIONS = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
VERSIONS = {
    "nbdkit": "--version", "nbdcopy": "--version", "qemu-img": "--version", "rsync": "--version",
    "zstd": "--version", "socat": "-V", "stunnel": "-version", "mkfs.ext4": "-V",
}  # fmt: skip
BUSY_LOAD = 0.5
STOLEN_SHARE = 0.02
_STOLEN = 7


def cores() -> int:
    """Cores that we may use."""
    return len(os.sched_getaffinity(0))


def load() -> float:
    """How many processes wanted a core in the last minute."""
    return os.getloadavg()[0]


class CoreTime:
    """What became of the cores' time since this was made."""

    def __init__(self) -> None:
        self._before = _ticks()

    def stolen_share(self) -> float:
        """The part of it that the hypervisor gave to somebody else."""
        spent = [after - before for before, after in zip(self._before, _ticks(), strict=True)]
        return spent[_STOLEN] / max(1, sum(spent))


def _ticks() -> list[int]:
    """User, nice, system, idle, waiting for disks, two of interrupts, stolen: proc(5)."""
    return [int(word) for word in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]


def congestions() -> tuple[str, ...]:
    """TCP congestion control algorithms, the default first."""
    default = CONGESTION.read_text().strip()
    return (default, *(name for name in CONGESTIONS.read_text().split() if name != default))


def described(folder: Path) -> dict[str, Any]:
    """For the report; ``folder``: where the disks are."""
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "file_system": _file_system(folder),
        "congestion_control": congestions()[0],
        "load": load(),
        "versions": {
            "replicator": __version__,
            "Python": platform.python_version(),
            "OpenSSL": ssl.OPENSSL_VERSION,
            "uvloop": version("uvloop"),
            "libzstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
            "xxhash": xxhash.XXHASH_VERSION,
            **{program: found for program in VERSIONS if (found := _version(program))},
        },
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(folder: Path) -> str:
    with suppress(OSError):
        command = ("findmnt", "--noheadings", "--output", "FSTYPE", "--target", str(folder))
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return "unknown"


def _version(program: str) -> str | None:
    if shutil.which(program) is None:
        return None
    done = subprocess.run((program, VERSIONS[program]), capture_output=True, text=True, check=False)
    found = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    return found[0] if found else None
