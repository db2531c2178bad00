"""FORMAT.md against the code: its example is read by its own tables and by the product, and made again."""

import json
import os
import re
import struct
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_intdigest

from protocol.messages import Interval
from protocol.payload import Extent, build, new_decompressor, unpack
from replicator.files import Files
from replicator.log import records
from replicator.log.gather import Frame, Scratch
from replicator.log.log import SEGMENT_BYTES, Kind, Log
from replicator.log.records import ALIGN, BEFORE_THE_LOG, BlockType, Identity
from replicator.log.segment import OpenSegment
from tests.replicator.log.batches import MIB, directory, held

FORMAT = (resources.files("replicator.log") / "FORMAT.md").read_text(encoding="utf-8")
LINE_BYTES = 32
FIELD = {4: "<I", 8: "<Q", 1: "<B", 2: "<H"}


@dataclass(frozen=True)
class Example:
    says: dict[str, Any]
    content: bytes

    @property
    def seed(self) -> int:
        return int(self.says["seed"], 16)

    def number(self, at: int, size: int) -> int:
        return int(struct.unpack_from(FIELD[size], self.content, at)[0])


def example() -> Example:
    says = json.loads(re.findall(r"```json\n(.*?)\n```", FORMAT, re.DOTALL)[0])
    content = bytearray(says["size"])
    for line in re.findall(r"```hex\n(.*?)\n```", FORMAT, re.DOTALL)[0].split("\n"):
        at, dump = line.split(" ")
        assert len(dump) == 2 * LINE_BYTES and int(at, 16) % LINE_BYTES == 0
        content[int(at, 16) : int(at, 16) + LINE_BYTES] = bytes.fromhex(dump)
    return Example(says, bytes(content))


def fields(section: str) -> list[tuple[str, str, str]]:
    """Offset, size and name of each row of the table below a heading."""
    behind = FORMAT.split(f"\n{section}\n", 1)[1].split("\n#", 1)[0]
    rows = re.findall(r"^\| (\w+) \| ([\w ]+) \| `(\w+)` \|", behind, re.MULTILINE)
    assert rows
    return rows


def test_the_examples_blocks_are_what_the_tables_say() -> None:
    shown = example()
    common = fields("## 3. Blocks")
    for number, block in enumerate(shown.says["blocks"], 1):
        at, kind = block["position"], BlockType[block["type"]]
        expected = {**shown.says, **block, "magic": 0x464C5052, "version": 1, "type": kind, "zero": 0}
        for offset, size, name in common:
            if name == "log":
                assert shown.content[at + 8 : at + 24].hex() == shown.says["log"]
            else:
                assert shown.number(at + int(offset), int(size)) == expected[name], (kind.name, name)
        own = fields(f"### 3.{number} {kind.name}")
        fixed = [row for row in own if row[1].isdigit()]
        assert {name for _, _, name in fixed} <= set(block)
        for offset, size, name in fixed:
            assert shown.number(at + int(offset), int(size)) == block[name], (kind.name, name)
        hashed = shown.content[at : at + ALIGN - 8]
        assert shown.number(at + ALIGN - 8, 8) == xxh3_64_intdigest(hashed, shown.seed)


def test_the_tables_leave_no_gap() -> None:
    position = 0
    for offset, size, _ in fields("## 3. Blocks"):
        assert int(offset) == position
        position += int(size)
    assert position == 48
    for number, kind in enumerate(BlockType, 1):
        behind = position
        for offset, size, _ in fields(f"### 3.{number} {kind.name}"):
            if offset.isdigit():
                assert int(offset) == behind
                behind += int(size.split()[0])


def test_the_examples_index_lists_its_records() -> None:
    shown = example()
    index = next(block for block in shown.says["blocks"] if block["type"] == "INDEX")
    (rows_at, row_size), (_, mark_size) = [
        (offset, int(size.split()[0])) for offset, size, _ in fields("### 3.3 INDEX")[2:]
    ]
    at = index["position"] + int(rows_at)
    for record in shown.says["records"]:
        assert shown.number(at, 8) == record["position"]
        header = shown.content[record["position"] : record["position"] + 72]
        assert shown.content[at + 8 : at + row_size] == header
        at += row_size
    assert (shown.number(at, 8), shown.number(at + 8, 8)) == (16384, 0)
    assert shown.content[at + mark_size : index["position"] + ALIGN - 8].strip(b"\0") == b""


def test_the_example_is_read(tmp_path: Path) -> None:
    shown = example()
    (tmp_path / shown.says["name"]).write_bytes(shown.content)
    with directory(tmp_path) as dir_fd:
        log = Log.open(Files(), dir_fd, Kind.REDO, shown.says["epoch"], shown.seed)
        assert log is not None
        assert log.finished
        (entries, content) = log.entries(1), held(log)
        log.close()
    assert [entry.offset for entry in entries] == [record["position"] for record in shown.says["records"]]
    for (header, body), record in zip(content, shown.says["records"], strict=True):
        extents, raw = unpack(header, memoryview(body), None, new_decompressor(), shown.seed)
        assert (header.disk, [header.cover_start, header.cover_end]) == (record["disk"], record["cover"])
        assert [list(extent) for extent in extents] == record["extents"]
        assert bytes(raw) == bytes.fromhex(record["raw"][0]) * record["raw"][1]
    assert (tmp_path / shown.says["name"]).read_bytes() == shown.content


def test_the_example_is_made_again(tmp_path: Path) -> None:
    shown = example()
    identity = Identity(Kind.REDO, bytes.fromhex(shown.says["log"]), shown.says["epoch"], 1)
    frames: list[Frame] = []
    for record in shown.says["records"]:
        raw = memoryview(bytes.fromhex(record["raw"][0]) * record["raw"][1])
        extents = [Extent(*extent) for extent in record["extents"]]
        cover = Interval(*record["cover"])
        made = build(record["disk"], shown.says["epoch"], cover, extents, raw, None, shown.seed)
        frames.append((made.header, memoryview(made.table + bytes(made.payload))))
    with directory(tmp_path) as dir_fd:
        segment = OpenSegment.create(Files(), dir_fd, identity, 0, MIB, shown.seed)
        segment.append(frames, BEFORE_THE_LOG, 0, Scratch())
        assert segment.finish(last=True) == shown.says["size"]
    assert os.listdir(tmp_path) == [shown.says["name"]]
    assert (tmp_path / shown.says["name"]).read_bytes() == shown.content


def test_the_numbers_in_the_text_are_those_of_the_code() -> None:
    assert "*blocks* have 4,096 bytes" in FORMAT
    assert ALIGN == 4096
    assert "at 64 MiB or below" in FORMAT
    assert SEGMENT_BYTES == 64 * MIB
    types = re.search(r"`type` \| (.*?) \|", FORMAT)
    kinds = re.search(r"`kind` \| (.*?) \|", FORMAT)
    assert types is not None and kinds is not None
    assert types[1] == ", ".join(f"{int(kind)} {kind.name}" for kind in BlockType)
    assert kinds[1] == ", ".join(f"{int(kind)} {kind.name.lower()}" for kind in Kind)
    assert f"{records.LOG_ID_BYTES} random bytes" in FORMAT
    assert records.FORMAT_VERSION == 1


def test_every_link_inside_leads_somewhere() -> None:
    titles = re.findall(r"^#+ (.*)$", FORMAT, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
    links = set(re.findall(r"\]\(#([^)]+)\)", FORMAT))
    assert links and links <= anchors
