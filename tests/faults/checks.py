"""After a crash: what is found is held against the oracle, then the sender comes back and everything goes on.

Not here: how the crash is made. The invariants I1 to I5 are told in README.md.
"""

import os
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar, cast

from protocol.messages import Mode
from protocol.payload import Extent
from replicator.extents import Relation
from replicator.files import Files
from replicator.holding import Holding
from replicator.log.log import Kind, Log, found
from replicator.log.points import GroupRecord
from replicator.log.views import Past, PointView
from replicator.sources.base import Source
from replicator.workers import Workers
from tests.faults.oracle import Oracle, Violation, difference
from tests.faults.story import HASH_SEED, Machine, Plot, Story, id_of
from tests.replicator.log.epochs import untrue

T = TypeVar("T")

OFTEN = 0.25  # of the states take the checks that add to those that every state takes


class Inline:
    """Stands in for `Workers`: what blocks is done at once. Small files need no thread."""

    async def run(self, work: Callable[..., T], *args: object) -> T:
        return work(*args)


class Base:
    """An image as a `Source` for views: nobody changes it meanwhile."""

    name = "base"

    def __init__(self, path: Path) -> None:
        self._content = path.read_bytes()
        self.size_bytes = len(self._content)

    async def read_into(self, extents: Sequence[Extent], view: memoryview, then: Callable[[], T]) -> T:
        view[:] = b"".join(self._content[start : start + length] for start, length, _ in extents)
        return then()


def shown(path: Path, number: int, later: Sequence[Log], before: Sequence[Log]) -> bytes:
    """A disk as a view shows it; `later` are the undo logs that lead from the image to the point, `before`
    the redo logs."""
    base = Base(path)
    past = Past(lambda: later, lambda: 0, lambda: before)
    view = PointView(cast(Source, base), number, "point", past, cast(Workers, Inline()), HASH_SEED)
    memory = bytearray(base.size_bytes)
    reading = view.read_into([Extent(0, len(memory))], memoryview(memory), lambda: None)
    try:
        reading.send(None)
    except StopIteration:
        return bytes(memory)
    raise RuntimeError("it waits for something")


def recovers(path: Path, oracle: Oracle, rng: random.Random) -> str:
    """Whatever happened, I1 to I4 hold, and the group goes on to the end of an epoch. Says what it was.

    Raises:
        Violation. ReplicatorError: recovery refuses what only a crash has left.
    """
    machine = Machine(path, Files())
    try:
        return _recovers(machine, oracle, rng)
    finally:
        machine.close()


def _recovers(machine: Machine, oracle: Oracle, rng: random.Random) -> str:
    what = _start(machine, rng)
    newest = _newest(machine, oracle)
    if rng.random() < OFTEN:
        points(machine, oracle, newest, applied=False)
    epoch = oracle.epoch
    if epoch is None or (newest is not None and rng.random() < 0.4):
        what, epoch = f"{what}, another epoch", oracle.another
    oracle.begins(epoch)
    holding = machine.open(epoch, newest)
    try:
        _is_at(holding, newest)
        _has_acknowledged(machine, holding, oracle, epoch)
        while holding.apply_next(False):
            pass
    finally:
        holding.close()
    points(machine, oracle, newest, applied=True)
    goes_on(machine, oracle, Plot(epoch, newest), rng)
    return what


def goes_on(machine: Machine, oracle: Oracle, plot: Plot, rng: random.Random) -> None:
    """The sender says the rest; the images then hold what it has. I4: said again, nothing changes."""
    story = Story(machine, oracle, oracle.source, rng)
    story.deliver(plot, whole=True)
    images_hold(machine, oracle, plot.epoch)
    if rng.random() < OFTEN:
        points(machine, oracle, plot.epoch, applied=True)
        record = machine.place.load()
        story.deliver(plot, whole=True)
        images_hold(machine, oracle, plot.epoch)
        if machine.place.load() != record:
            raise Violation("I4: what was sealed before was sealed once more")


def points(machine: Machine, oracle: Oracle, newest: int | None, *, applied: bool) -> None:
    """I3: every recovery point that was promised is there, and shows what the source held then.

    ``applied``: everything that is sealed must be in the images.
    """
    if newest is None:
        return
    record = machine.place.load()
    numbers = {id_of(epoch): epoch for epoch in range(oracle.another)}
    there = {known.number: numbers.get(known.id, -1) for known in record.epochs}
    promised = oracle.points(newest)
    if [epoch for epoch in there.values() if epoch <= newest][-len(promised) :] != promised:
        raise Violation(f"I3: points {list(there.values())}; {promised} were promised")
    with ExitStack() as opening:
        undo, redo = _logs(machine, record, opening)
        for number, epoch in there.items():
            if applied and number in redo and epoch <= newest:
                raise Violation(f"I2: epoch {epoch} is not applied")
            later = [undo[each] for each in sorted(undo) if each > number]
            before = [redo[each] for each in sorted(redo) if each <= number]
            _shows(machine, oracle, record, epoch, later, before)
        _undo_is_true(oracle, record, there, undo)


def _shows(
    machine: Machine,
    oracle: Oracle,
    record: GroupRecord,
    epoch: int,
    later: Sequence[Log],
    before: Sequence[Log],
) -> None:
    known = record.find(id_of(epoch))
    for disk in known.disks if known is not None else ():
        seen = shown(machine.flat(disk.name), disk.number, later, before)
        wrong = difference(seen, oracle.source.at(epoch)[disk.name])
        if wrong:
            raise Violation(f"I3: point {epoch}, disk {disk.name}: {wrong}")


def images_hold(machine: Machine, oracle: Oracle, epoch: int) -> None:
    """The images are what the source was at this epoch, byte for byte."""
    for name, content in oracle.source.at(epoch).items():
        wrong = difference(machine.flat(name).read_bytes(), content)
        if wrong:
            raise Violation(f"I2: image {name} at epoch {epoch}: {wrong}")


def _start(machine: Machine, rng: random.Random) -> str:
    """The master target starts again, and may get on for a while before the sender calls."""
    holding = machine.open_again() if rng.random() < 0.5 else None
    if holding is None:
        return "called"
    steps = rng.choice((0, 1, 100))
    while steps and holding.apply_next(False):
        steps -= 1
    holding.close()
    return "went on by itself"


def _newest(machine: Machine, oracle: Oracle) -> int | None:
    """I2: the newest sealed epoch is one that may be."""
    sealed = machine.images.epochs_of(machine.place.group).sealed
    epochs = [None, *range(oracle.another)]
    newest = next((epoch for epoch in epochs if id_of(epoch) == sealed), -1)
    if not oracle.may_be_newest(newest):
        raise Violation(f"I2: at epoch {newest}; SEALED was answered for {oracle.newest}")
    if newest is not None:
        oracle.sealed(newest)  # found once, it may not go again
    return newest


def _is_at(holding: Holding, newest: int | None) -> None:
    """I2: opened, the group is where its catalogue said, and needs differences only."""
    epochs = holding.group.epochs
    if epochs.sealed != id_of(newest):
        raise Violation(f"I2: epoch {newest} is not believed any more; adopted: {holding.group.adopted}")
    if newest is not None and not holding.group.sealed and epochs.mode is not Mode.INCREMENTAL:
        raise Violation(f"I2: epoch {newest} is sealed, and yet everything is compared")


def _has_acknowledged(machine: Machine, holding: Holding, oracle: Oracle, epoch: int) -> None:
    """I1: what was acknowledged is known as durable; what of it is in an image already, is right there.

    What lies in a log is held against the source when it is applied: only what is not durable is sent.
    """
    for disk in holding.disks if not holding.group.sealed else ():
        for start, end in oracle.acked[disk.name].intervals():
            if disk.durable.relation(start, end) is not Relation.COVERED:
                raise Violation(f"I1: disk {disk.name}: [{start}, {end}) was acknowledged")
        content = oracle.source.at(epoch)[disk.name]
        for start, end in disk.durable.intervals() if holding.group.journal is not None else ():
            wrong = difference(machine.flat(disk.name).read_bytes()[start:end], content[start:end])
            if wrong:
                raise Violation(f"I1: disk {disk.name}, from byte {start} on: {wrong}")


def _logs(machine: Machine, record: GroupRecord, opening: ExitStack) -> tuple[dict[int, Log], dict[int, Log]]:
    """The undo logs by epoch number, and the redo logs of what is sealed."""
    dir_fd = machine.place.open()
    opening.callback(os.close, dir_fd)
    logs = found(machine.files, dir_fd)
    sealed = {known.number for known in record.epochs}
    opened: dict[Kind, dict[int, Log]] = {Kind.UNDO: {}, Kind.REDO: {}}
    for kind, number in logs:
        wanted = kind is Kind.UNDO or number in sealed
        log = Log.open(machine.files, dir_fd, kind, number, HASH_SEED) if wanted else None
        if log is not None:
            opening.callback(log.close)
            opened[kind][number] = log
    return opened[Kind.UNDO], opened[Kind.REDO]


def _undo_is_true(oracle: Oracle, record: GroupRecord, there: dict[int, int], undo: dict[int, Log]) -> None:
    """I3: nothing in an undo log was taken from an image that held a part of the new epoch already."""
    for number, log in undo.items():
        before = max((known for known in there if known < number), default=None)
        if before is not None:
            content = oracle.source.at(there[before])
            models = {disk.number: content[disk.name] for disk in record.epochs[-1].disks}
            if lies := untrue(log, models):
                raise Violation(f"I3: undo of epoch number {number} was never so: {lies[:3]}")
