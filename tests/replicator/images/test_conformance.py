"""The conformance suite over every kind of image and several file systems."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from replicator.files import Files
from replicator.formats.vmdk import CreateType
from replicator.images.device import RawImage
from replicator.images.flat_vmdk import FlatVmdk
from replicator.images.writer import FileImage
from tests.replicator.images.conformance import FileConformance, FileKind, read_back


@dataclass
class Vmdk:
    """A flat VMDK; published at once, so that it is opened again through its descriptor."""

    folder: Path
    thin: bool
    create_type: CreateType
    undo: ExitStack
    sector: int = 512
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        self.path = self.folder / "disk-flat.vmdk"
        self.dir_fd = os.open(self.folder, os.O_RDONLY)
        self.undo.callback(os.close, self.dir_fd)

    def make(self, files: Files, size: int) -> FlatVmdk:
        image = FlatVmdk.create(
            files, self.dir_fd, "disk", size, thin=self.thin, create_type=self.create_type
        )
        image.publish(cid=1)
        return image

    def reopen(self, files: Files) -> FlatVmdk:
        return FlatVmdk.open_published(files, self.dir_fd, "disk")

    def content(self, size: int) -> bytes:
        return read_back(self.path, size)


@dataclass
class RawFile:
    folder: Path
    sector: int = 512

    @property
    def path(self) -> Path:
        return self.folder / "disk.img"

    def make(self, files: Files, size: int) -> RawImage:
        return RawImage.create(files, self.path, size)

    def reopen(self, files: Files) -> RawImage:
        return RawImage.open(files, self.path)

    def content(self, size: int) -> bytes:
        return read_back(self.path, size)


@dataclass
class Device:
    """A block device is made with its size, and opened each time."""

    loop: Callable[..., Path]
    sector: int
    path: Path = field(default_factory=Path)

    def make(self, files: Files, size: int) -> FileImage:
        self.path = self.loop(size, self.sector)
        return self.reopen(files)

    def reopen(self, files: Files) -> RawImage:
        return RawImage.open(files, self.path)

    def content(self, size: int) -> bytes:
        return read_back(self.path, size)


MOUNTED_BYTES = 400 << 20  # mkfs.xfs wants 300 MiB
LOOP = pytest.mark.peer("losetup")
KINDS = [
    "thin vmfs",
    "thick monolithicFlat",
    "raw file",
    pytest.param("device 512", marks=LOOP),
    pytest.param("device 4096", marks=LOOP),
    pytest.param("thin vmfs on xfs", marks=[LOOP, pytest.mark.peer("mkfs.xfs")]),
    pytest.param("thick vmfs on xfs", marks=[LOOP, pytest.mark.peer("mkfs.xfs")]),
    pytest.param("thin vmfs on tmpfs"),
]


class TestImages(FileConformance):
    @pytest.fixture(params=KINDS)
    def kind(self, request: pytest.FixtureRequest, folder: Path) -> Iterator[FileKind]:
        with ExitStack() as undo:
            match request.param.split():
                case ["raw", "file"]:
                    yield RawFile(folder)
                case ["device", sector]:
                    yield Device(request.getfixturevalue("loop"), int(sector))
                case [provisioning, create_type]:
                    yield Vmdk(folder, provisioning == "thin", create_type, undo)
                case [provisioning, create_type, "on", file_system]:
                    place = request.getfixturevalue("mounted")(file_system, MOUNTED_BYTES)
                    yield Vmdk(place, provisioning == "thin", create_type, undo)
