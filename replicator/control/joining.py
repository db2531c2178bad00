"""What ``enrolment.py`` asks of the database, in its worker threads: who may join, and who is revoked.

The threads wait for the event loop that owns the database. Not here: the conversation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from replicator.clock import Clock
from replicator.control import audit
from replicator.control.database import Database
from replicator.control.repositories import join_tokens, servers
from replicator.failpoints import reach
from replicator.tokens import Guesses

T = TypeVar("T")


class JoinDesk:
    """Stands in for ``TokenBook`` where a control server answers joins. Make it on the event loop.

    Both methods block, and are for other threads than the event loop's.
    """

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._guesses = Guesses(clock)
        self._loop = asyncio.get_running_loop()

    def redeem(self, token_id: bytes, secret: bytes, spki: bytes, source: str) -> str:
        """As ``TokenBook.redeem``; the server stands in the database then, and in the audit log."""
        self._guesses.check(source)  # before anything touches the database
        return self._wait(self._redeem((token_id, secret), spki, source))

    def is_revoked(self, server_id: str) -> bool:
        """Whether an id is revoked; if that cannot be found out, it raises."""
        return self._wait(self._is_revoked(server_id))

    async def _redeem(self, token: tuple[bytes, bytes], spki: bytes, source: str) -> str:
        now_ns = self._clock.now_ns()
        async with self._database.write() as connection:
            server_id = await join_tokens.redeem(connection, token, spki, source, self._guesses, now_ns)
            details = {"token": token[0].hex(), "source": source}
            await audit.append(connection, audit.Deed(server_id, "join", server_id, details), now_ns)
        reach("token.bound")
        return server_id

    async def _is_revoked(self, server_id: str) -> bool:
        async with self._database.read() as connection:
            return await servers.is_revoked(connection, server_id)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
