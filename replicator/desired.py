"""What an agent has to do, as one document: the groups that it serves, and who is no longer trusted.

It is desired state, not commands: an agent keeps the newest document and converges on it, with its link or
without. Documents are compared by their revision, groups by value. JSON, of exactly these fields: what is
unknown is refused, and the version changes when fields do. Pure: how it travels and where it is kept is the
business of the control server and the agents.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from protocol.constants import NAME_MAX_BYTES, STREAMS_MAX

VERSION = 1
GROUPS_MAX = 1000
DISKS_MAX = 64  # of a group: VMware's limit for a machine is 60 on four controllers
SOURCE_MAX_BYTES = 4096
ASSIGNMENT_MAX_BYTES = 4096
INTERVAL_MIN_S = 1.0
INTERVAL_MAX_S = 7 * 86400.0
KEEP_MAX_S = 366 * 86400.0
KEEP_COUNT_MAX = 1 << 20
LEVEL_MAX = 19
DOCUMENT_MAX_BYTES = 16 << 20
GENERATION_MAX = (1 << 63) - 1

_ADDRESS = re.compile(
    r"(?:\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?\]|[A-Za-z0-9_][A-Za-z0-9_.-]{0,253}):[0-9]{1,5}"
)
_NAME_WANTED = f"1 to {NAME_MAX_BYTES} printable bytes are wanted"
_SERVER = re.compile(r"(?:ps|mt|cs)-[0-9a-f]{32}")


class DesiredError(ValueError):
    """A document or group is refused. ``mistakes``: each as ``key: what is wrong``."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("; ".join(mistakes))
        self.mistakes = tuple(mistakes)


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk. ``name``: at the master target; ``source``: a path or an address in Azure."""

    name: str
    source: str


@dataclass(frozen=True, slots=True)
class Peer:
    """The other server of a group. ``id``: its identity, empty where only its address is known."""

    address: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class Retention:
    """How long recovery points stay. ``keep_s``: since they were sealed; ``keep_count``: None: any number."""

    keep_s: float = 24 * 3600.0
    keep_count: int | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """A group to be replicated.

    Attributes:
        name: of the group, at both ends.
        disks: at least one; no name and no source twice.
        peer: the master target, for a process server; the process server, for a master target.
        interval_s: from the begin of one cycle to that of the next.
        jitter_s: at most so much is added at random, so that groups do not keep step.
        retention: for the master target.
        streams: data streams, 1 to 16.
        level: zstd level; 0 is off, None follows the bottleneck.
        quiesced: the operator vouches that nobody writes to the sources.
        generation: of the assignment; 0 where there is no control server.
        assignment: the signed right to the group, which OPEN shows; empty where there is no control server.
    """

    name: str
    disks: tuple[Disk, ...]
    peer: Peer
    interval_s: float
    jitter_s: float = 0.0
    retention: Retention = field(default_factory=Retention)
    streams: int = 4
    level: int | None = None
    quiesced: bool = False
    generation: int = 0
    assignment: bytes = b""


@dataclass(frozen=True, slots=True)
class Desired:
    """The document. ``revoked``: ids of servers that are not to be let in, sorted."""

    revision: int
    groups: tuple[Group, ...] = ()
    revoked: tuple[str, ...] = ()


def encode(desired: Desired) -> bytes:
    """The document as JSON; ``DesiredError`` if it is none that ``decode`` would take."""
    mistakes = list(_mistakes(desired))
    if mistakes:
        raise DesiredError(mistakes)
    groups = [{**asdict(group), "assignment": group.assignment.hex()} for group in desired.groups]
    content = {
        "version": VERSION,
        "revision": desired.revision,
        "groups": groups,
        "revoked": list(desired.revoked),
    }
    return json.dumps(content, separators=(",", ":"), sort_keys=True).encode()


def decode(content: bytes) -> Desired:
    """The document in ``content``.

    Raises:
        DesiredError: it is none, with every mistake in it.
    """
    if len(content) > DOCUMENT_MAX_BYTES:
        raise DesiredError([f"document: more than {DOCUMENT_MAX_BYTES} bytes"])
    try:
        found = json.loads(content, object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise DesiredError(["document: not JSON, or a key stands in it twice"]) from None
    fields = {"version": int, "revision": int, "groups": list, "revoked": list}
    mistakes = list(_misfits(found, fields, "document"))
    if mistakes:
        raise DesiredError(mistakes)
    if found["version"] != VERSION:
        raise DesiredError([f"version: {found['version']} is not known, {VERSION} is"])
    for number, group in enumerate(found["groups"]):
        mistakes += _group_misfits(group, f"groups[{number}]")
    mistakes += [
        f"revoked[{number}]: not text" for number, id_ in enumerate(found["revoked"]) if type(id_) is not str
    ]
    if mistakes:
        raise DesiredError(mistakes)
    desired = Desired(
        found["revision"], tuple(_group(group) for group in found["groups"]), tuple(found["revoked"])
    )
    mistakes = list(_mistakes(desired))
    if mistakes:
        raise DesiredError(mistakes)
    return desired


# ------------------------------------------------------------------ the shape

_NUMBER = (int, float)
_GROUP_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "name": str,
    "disks": list,
    "peer": dict,
    "interval_s": _NUMBER,
    "jitter_s": _NUMBER,
    "retention": dict,
    "streams": int,
    "level": (int, type(None)),
    "quiesced": bool,
    "generation": int,
    "assignment": str,
}
_RETENTION_FIELDS = {"keep_s": _NUMBER, "keep_count": (int, type(None))}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _misfits(found: object, fields: Mapping[str, type | tuple[type, ...]], where: str) -> list[str]:
    """What keeps ``found`` from being a record of exactly these fields of exactly these types."""
    if type(found) is not dict:
        return [f"{where}: not a record"]
    mistakes = [f"{where}.{key}: missing" for key in fields if key not in found]
    mistakes += [f"{where}.{key}: unknown" for key in found if key not in fields]
    for key, kinds in fields.items():
        wanted = kinds if isinstance(kinds, tuple) else (kinds,)
        if key in found and type(found[key]) not in wanted:  # a bool is no int here
            mistakes.append(f"{where}.{key}: of the wrong type")
        elif type(found.get(key)) is int and abs(found[key]) > GENERATION_MAX:
            mistakes.append(f"{where}.{key}: too large")
    return mistakes


def _group_misfits(found: object, where: str) -> list[str]:
    mistakes = _misfits(found, _GROUP_FIELDS, where)
    if mistakes or not isinstance(found, dict):
        return mistakes
    mistakes += _misfits(found["peer"], {"address": str, "id": str}, f"{where}.peer")
    mistakes += _misfits(found["retention"], _RETENTION_FIELDS, f"{where}.retention")
    for number, disk in enumerate(found["disks"]):
        mistakes += _misfits(disk, {"name": str, "source": str}, f"{where}.disks[{number}]")
    if not re.fullmatch(r"(?:[0-9a-f]{2})*", found["assignment"]):
        mistakes.append(f"{where}.assignment: not in hex")
    return mistakes


def _group(found: Mapping[str, Any]) -> Group:
    rest = {key: found[key] for key in ("name", "streams", "level", "quiesced", "generation")}
    retention = found["retention"]
    return Group(
        disks=tuple(Disk(disk["name"], disk["source"]) for disk in found["disks"]),
        peer=Peer(found["peer"]["address"], found["peer"]["id"]),
        interval_s=float(found["interval_s"]),
        jitter_s=float(found["jitter_s"]),
        retention=Retention(float(retention["keep_s"]), retention["keep_count"]),
        assignment=bytes.fromhex(found["assignment"]),
        **rest,
    )


# ------------------------------------------------------------------ what is in it


def group_mistakes(group: Group) -> list[str]:
    """What is wrong with a group, each as ``key: what``. For documents and for configuration files alike."""
    found: list[str] = []

    def check(holds: bool, key: str, what: str) -> None:
        if not holds:
            found.append(f"{key}: {what}")

    check(is_name(group.name), "name", _NAME_WANTED)
    check(1 <= len(group.disks) <= DISKS_MAX, "disks", f"1 to {DISKS_MAX} are wanted, not {len(group.disks)}")
    for number, disk in enumerate(group.disks):
        check(is_name(disk.name), f"disks[{number}].name", _NAME_WANTED)
        fits = 0 < len(disk.source.encode(errors="replace")) <= SOURCE_MAX_BYTES and "\0" not in disk.source
        check(fits, f"disks[{number}].source", "a path or an address in Azure is wanted")
    for key, of in _DISK_KEYS.items():
        twice = [text for text, times in Counter(map(of, group.disks)).items() if times > 1]
        check(not twice, "disks", f"the {key} {', '.join(map(repr, twice))} stands there twice")
    check(is_address(group.peer.address), "peer", "its address is to be HOST:PORT")
    check(not group.peer.id or is_server(group.peer.id), "peer", "its id is no id of a server")
    within = INTERVAL_MIN_S <= group.interval_s <= INTERVAL_MAX_S
    check(within, "interval_s", f"{INTERVAL_MIN_S:.0f} to {INTERVAL_MAX_S:.0f} s are wanted")
    check(0 <= group.jitter_s <= group.interval_s, "jitter_s", "0 to interval_s is wanted")
    check(0 <= group.retention.keep_s <= KEEP_MAX_S, "retention", f"keep_s is to be 0 to {KEEP_MAX_S:.0f}")
    count = group.retention.keep_count
    check(
        count is None or 1 <= count <= KEEP_COUNT_MAX,
        "retention",
        f"keep_count is to be 1 to {KEEP_COUNT_MAX}, or none",
    )
    check(1 <= group.streams <= STREAMS_MAX, "streams", f"1 to {STREAMS_MAX} are wanted")
    check(
        group.level is None or 0 <= group.level <= LEVEL_MAX, "level", f"0 to {LEVEL_MAX} is wanted, or none"
    )
    check(0 <= group.generation <= GENERATION_MAX, "generation", "a number from 0 is wanted")
    check(len(group.assignment) <= ASSIGNMENT_MAX_BYTES, "assignment", f"over {ASSIGNMENT_MAX_BYTES} bytes")
    return found


_DISK_KEYS: Mapping[str, Callable[[Disk], str]] = {
    "name": lambda disk: disk.name,
    "source": lambda disk: disk.source,
}


def is_name(text: str) -> bool:
    """Whether a text can name a group or disk on the wire."""
    return text.isprintable() and 1 <= len(text.encode(errors="replace")) <= NAME_MAX_BYTES


def is_address(text: str) -> bool:
    """Whether a text is ``HOST:PORT`` or ``[IPV6]:PORT``."""
    return bool(_ADDRESS.fullmatch(text)) and int(text.rpartition(":")[2]) <= 0xFFFF


def is_server(text: str) -> bool:
    """Whether a text is the id of a server."""
    return bool(_SERVER.fullmatch(text))


def _mistakes(desired: Desired) -> list[str]:
    found = []
    if not 0 <= desired.revision <= GENERATION_MAX:
        found.append("revision: a number from 0 is wanted")
    if len(desired.groups) > GROUPS_MAX:
        found.append(f"groups: {len(desired.groups)}, at most {GROUPS_MAX} are wanted")
    for number, group in enumerate(desired.groups):
        found += [f"groups[{number}].{mistake}" for mistake in group_mistakes(group)]
    names = Counter(group.name for group in desired.groups)
    found += [f"groups: {name!r} stands there twice" for name, times in names.items() if times > 1]
    found += [f"revoked: {id_[:60]!r} is no id of a server" for id_ in desired.revoked if not is_server(id_)]
    if list(desired.revoked) != sorted(set(desired.revoked)):
        found.append("revoked: not sorted, or an id twice")
    return found
