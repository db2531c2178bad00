"""A master target in the test's own process, whose power can be cut: its door, receiver, groups and files.

Not here: the line (`virtual_line.py`) and what is sent (`test_virtual_time.py`).
"""

import asyncio
import contextvars
import random
from pathlib import Path
from typing import cast

from replicator.errors import ReplicatorError
from replicator.groups import Groups, Limits
from replicator.images.directory import ImageDirectory
from replicator.private_directory import PrivateDirectory
from replicator.receiver import Receiver
from replicator.transport.stream import Stream
from replicator.workers import Workers
from tests.faults.oracle import KIB
from tests.faults.story import HASH_SEED, SEGMENT_BYTES
from tests.faults.virtual_time import MACHINE, Tasks, VirtualClock, VirtualWorkers
from tests.faulty_files import FaultyFiles

CREDIT_BYTES = 320 * KIB
LOG_BYTES = 4 * SEGMENT_BYTES  # as LOG_BYTES_MIN: half of it takes the largest commit


class Machine:
    """One life of a master target: from its start to the next power cut.

    Attributes:
        on: it serves whoever connects.
        defects: what no stream's handler may raise.
    """

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.files = FaultyFiles(rng.randrange(1 << 32))
        self.workers = VirtualWorkers(rng)
        self.on = False
        self.defects: list[BaseException] = []
        self._tasks: Tasks = set()
        self._context = contextvars.copy_context()
        self._context.run(MACHINE.set, self._tasks)
        (path / "disks").mkdir(parents=True, exist_ok=True)
        retention = PrivateDirectory(self.files, path / "retention")
        images = ImageDirectory(self.files, path / "disks", retention, thin=True)
        workers = cast(Workers, self.workers)
        self.groups = Groups(images, retention, workers, HASH_SEED, VirtualClock(), Limits(LOG_BYTES))
        self.receiver = Receiver(self.groups, workers, HASH_SEED, lambda _: "process-server", CREDIT_BYTES)

    async def start(self) -> None:
        """Until the power is cut, it serves; the power may be cut meanwhile."""
        starting = self._run(self.groups.start())
        await first_of(starting, self._run(self.workers.off.wait()))
        self.on = not self.workers.off.is_set()

    def accept(self, stream: Stream) -> None:
        """Somebody connected."""
        self._run(self._serve(stream))

    async def stop(self) -> None:
        """What it had in memory is gone, and what it had open is closed."""
        self.on = False
        while self._tasks:  # what one of them does at its end is nothing any more, either
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.sleep(0)

    @property
    def tasks(self) -> int:
        """How many there are."""
        return len(self._tasks)

    def _run(self, coroutine):
        return asyncio.get_running_loop().create_task(coroutine, context=self._context)

    async def _serve(self, stream: Stream) -> None:
        try:
            await self.receiver.serve(stream)
        except ReplicatorError as error:
            stream.fail(error)
        except Exception as error:
            self.defects.append(error)
            raise
        finally:
            await stream.close()


async def first_of(*tasks: "asyncio.Task[object]") -> None:
    """Wait for one of them; the others are cancelled."""
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
