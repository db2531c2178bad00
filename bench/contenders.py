"""What a contender is, and what it is given; the peers, each as its users would start it.

A run of a contender: ``lay`` what its destination holds before, ``serve`` (both untimed), then ``send`` whole
commands against the clock. Every one of them writes to a file of the same file system; the clock stops after
an fdatasync of that file, which costs nothing where the contender has done it itself. Replicator is in
``ours.py``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from subprocess import PIPE

from bench import certificates, disk
from bench.namespaces import Network
from bench.processes import Crowd, Member

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Ends:
    """Where the two ends of a run are.

    Attributes:
        near: where is sent. far: where is received. address, port: where the far end listens.
    """

    near: Network
    far: Network
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one contender.

    Attributes:
        source: the image to bring over. old: what the destination holds before; None: nothing.
        room: an empty folder for the destination and all else. ends: where. keys: folder of certificates.
    """

    source: Path
    old: Path | None
    room: Path
    ends: Ends
    keys: Path

    @property
    def target(self) -> Path:
        """Where the peers write."""
        return self.room / "target.img"


def raw_file(job: Job) -> Path:
    """The destination of most: a raw file with the old content, or a sparse one without any."""
    if job.old is not None:
        disk.copy(job.old, job.target)
    else:
        with job.target.open("wb") as file:
            file.truncate(job.source.stat().st_size)
    return job.target


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that brings a disk from one end to the other.

    Attributes:
        name: what the tables call it.
        programs: what must be installed for it.
        serve: starts the far end and waits until it listens.
        send: brings the disk over, to the end of all that has to end.
        lay: makes the destination as it is before the run; gives the file that will hold the disk.
        check: a reason if it did not do what its name says, whatever the destination holds.
        ours: it is Replicator.
    """

    name: str
    programs: Sequence[str]
    serve: Callable[[Job, Crowd], object]
    send: Callable[[Job, Crowd], object]
    lay: Callable[[Job], Path] = raw_file
    check: Callable[[Job], str | None] = lambda _: None
    ours: bool = False

    def missing(self) -> list[str]:
        """The programs that are not installed."""
        return [program for program in self.programs if shutil.which(program) is None]


def nbdcopy() -> Contender:
    """With nbdcopy to nbdkit's file plugin, over TLS."""
    return Contender("nbdcopy -C 4, TLS", ("nbdkit", "nbdcopy"), _nbdkit, _nbdcopy)


def qemu_img() -> Contender:
    """With qemu-img convert to qemu-nbd, over TLS."""
    return Contender("qemu-img -W -m 16, TLS", ("qemu-img", "qemu-nbd"), _qemu_nbd, _qemu_img)


def zstd_pipe() -> Contender:
    """With zstd, piped through TLS (socat) into zstd -d."""
    return Contender("zstd -1 -T2, TLS", ("zstd", "socat"), _far_pipe, _near_pipe)


def rsync(name: str, *options: str, tls: bool = False) -> Contender:
    """With rsync to an rsync daemon, plain or through stunnel on both ends."""
    programs = ("rsync", "stunnel") if tls else ("rsync",)
    return Contender(
        name, programs, partial(_rsync_daemon, tls=tls), partial(_rsync, options=options, tls=tls)
    )


def listening(job: Job, crowd: Crowd, member: Member) -> None:
    """Wait until a server listens."""
    crowd.ready(member, lambda: job.ends.far.listens(job.ends.port))


# ------------------------------------------------------------------ NBD


def _nbdkit(job: Job, crowd: Crowd) -> None:
    ends = job.ends
    command = (
        "nbdkit", "--foreground", "--ipaddr", ends.address, "--port", str(ends.port),
        "--tls=require", f"--tls-certificates={job.keys}", "--tls-verify-peer", "file", str(job.target),
    )  # fmt: skip
    listening(job, crowd, crowd.start("nbdkit", command, prefix=ends.far.prefix, server=True))


def _nbdcopy(job: Job, crowd: Crowd) -> None:
    ends = job.ends
    command = (
        "nbdcopy", "--flush", "--destination-is-zero", "-C", "4", "-T", "2", "--request-size=1048576",
        str(job.source), f"nbds://{ends.address}:{ends.port}?tls-certificates={job.keys}",
    )  # fmt: skip
    crowd.finish(crowd.start("nbdcopy", command, prefix=ends.near.prefix))


def _qemu_nbd(job: Job, crowd: Crowd) -> None:
    ends = job.ends
    command = (
        "qemu-nbd", "--persistent", "--format=raw", f"--bind={ends.address}", f"--port={ends.port}",
        "--export-name=disk", "--object", f"tls-creds-x509,id=tls,endpoint=server,dir={job.keys}",
        "--tls-creds=tls", str(job.target),
    )  # fmt: skip
    listening(job, crowd, crowd.start("qemu-nbd", command, prefix=ends.far.prefix, server=True))


def _qemu_img(job: Job, crowd: Crowd) -> None:
    ends = job.ends
    target = (
        f"driver=raw,file.driver=nbd,file.server.type=inet,file.server.host={ends.address},"
        f"file.server.port={ends.port},file.export=disk,file.tls-creds=tls"
    )
    # Without -t, qemu-img would pick a cache mode for the target that ignores flushes.
    command = (
        "qemu-img", "convert", "-n", "-W", "-m", "16", "-t", "writeback", "--target-is-zero",
        "--object", f"tls-creds-x509,id=tls,endpoint=client,dir={job.keys}", "-f", "raw",
        "--target-image-opts", str(job.source), target,
    )  # fmt: skip
    crowd.finish(crowd.start("qemu-img", command, prefix=ends.near.prefix))


# ------------------------------------------------------------------ a pipe


def _socat(job: Job, kind: str, certificate: str, key: str, *options: str) -> str:
    """An address of socat's."""
    files = (f"cert={job.keys / certificate}", f"key={job.keys / key}",
             f"cafile={job.keys / certificates.AUTHORITY}")  # fmt: skip
    return ",".join((kind, *options, "openssl-min-proto-version=TLS1.3", "verify=1", *files))


def _far_pipe(job: Job, crowd: Crowd) -> None:
    ends = job.ends
    address = _socat(
        job, f"OPENSSL-LISTEN:{ends.port}", certificates.SERVER, certificates.SERVER_KEY,
        f"bind={ends.address}", "reuseaddr",
    )  # fmt: skip
    command = ("socat", "-u", "-b", str(MIB), address, "STDOUT")
    socat = crowd.start("socat, far", command, prefix=ends.far.prefix, server=True, stdout=PIPE)
    crowd.start("zstd -d", ("zstd", "-d", "-q", "-f", "-o", job.target), server=True, behind=socat)
    listening(job, crowd, socat)


def _near_pipe(job: Job, crowd: Crowd) -> None:
    ends = job.ends
    zstd = crowd.start("zstd", ("zstd", "-1", "-T2", "-q", "-c", job.source), stdout=PIPE)
    address = _socat(
        job, f"OPENSSL:{ends.address}:{ends.port}", certificates.CLIENT, certificates.CLIENT_KEY,
        f"commonname={ends.address}",
    )  # fmt: skip
    command = ("socat", "-u", "-b", str(MIB), "STDIN", address)
    crowd.start("socat, near", command, prefix=ends.near.prefix, behind=zstd)
    crowd.finish(*crowd.members)  # the far end ends, too, when it has written everything


# ------------------------------------------------------------------ rsync


def _rsync_daemon(job: Job, crowd: Crowd, *, tls: bool) -> None:
    ends = job.ends
    who = ("uid = 0", "gid = 0") if os.geteuid() == 0 else ()  # else a daemon of root's writes as nobody
    daemon = _written(
        job.room / "rsyncd.conf", "use chroot = no", *who, "[room]", f"path = {job.room}", "read only = no"
    )
    command = [
        "rsync", "--daemon", "--no-detach", f"--config={daemon}", f"--address={ends.address}",
        f"--port={ends.port}",
    ]  # fmt: skip
    if tls:
        far = _stunnel(
            job, "far", certificates.SERVER, certificates.SERVER_KEY,
            "foreground = yes", "[rsync]", f"accept = {ends.address}:{ends.port}",
            f"exec = {shutil.which('rsync')}", f"execArgs = rsync --daemon --config={daemon}",
        )  # fmt: skip
        command = ["stunnel", str(far)]
    name = "stunnel, far" if tls else "rsync, far"
    listening(job, crowd, crowd.start(name, command, prefix=ends.far.prefix, server=True))


def _rsync(job: Job, crowd: Crowd, *, options: Sequence[str], tls: bool) -> None:
    ends = job.ends
    environment = {}
    if tls:
        near = _stunnel(
            job, "near", certificates.CLIENT, certificates.CLIENT_KEY,
            "client = yes", f"connect = {ends.address}:{ends.port}", f"checkIP = {ends.address}",
        )  # fmt: skip
        environment["RSYNC_CONNECT_PROG"] = f"stunnel {near}"
    there = f"rsync://{ends.address}:{ends.port}/room/{job.target.name}"
    # --ignore-times: what decides shall be the content.
    command = ("rsync", "--ignore-times", *options, str(job.source), there)
    crowd.finish(crowd.start("rsync, near", command, prefix=ends.near.prefix, environment=environment))


def _stunnel(job: Job, end: str, certificate: str, key: str, *lines: str) -> Path:
    return _written(
        job.room / f"stunnel-{end}.conf",
        "pid =", "debug = 3", "sslVersionMin = TLSv1.3", f"cert = {job.keys / certificate}",
        f"key = {job.keys / key}", f"CAfile = {job.keys / certificates.AUTHORITY}", "verifyChain = yes",
        *lines,
    )  # fmt: skip


def _written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path
