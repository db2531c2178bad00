"""Many disks sent at once by one process, as a process server does it: one event loop, a group for each disk.

    python -m bench.log.senders AT_ONCE HOST:PORT STATE TOKEN_FILE SOURCE...

AT_ONCE of them are in the middle of a cycle at the same time, the others wait for their turn. Prints a JSON
document: when each disk was done, in seconds since all of them were due, and what senders said as they had to
try again.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import uvloop

from agents.process_server import send
from agents.send_config import DiskConfig, SendConfig
from replicator.clock import Clock
from replicator.files import Files
from replicator.framing import Progress
from replicator.transport.dial import Address

GIVE_UP_AFTER_S = 120.0


async def _all(at_once: int, to: Address, state: Path, token: str, sources: list[Path]) -> dict[str, object]:
    began_s = time.perf_counter()
    turns = asyncio.Semaphore(at_once)
    waits: list[str] = []

    async def one(source: Path) -> float:
        config = SendConfig(
            group=source.stem,
            disks=(DiskConfig(source.stem, str(source)),),
            to=to,
            token=token,
            state=state,
            streams=4,
            level=None,
            quiesced=False,
            give_up_after_s=GIVE_UP_AFTER_S,
        )
        async with turns:
            await send(config, Progress(), Clock(), Files(), waits.append)
        return time.perf_counter() - began_s

    done_s = await asyncio.gather(*map(one, sources))
    return {"seconds": done_s, "waits": waits}


def main() -> None:
    """``python -m bench.log.senders``."""
    at_once, to, state, token_file, *sources = sys.argv[1:]
    token = Path(token_file).read_text().strip()
    found = uvloop.run(_all(int(at_once), Address.parse(to), Path(state), token, list(map(Path, sources))))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
