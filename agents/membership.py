"""The place of a process server in an installation: joins with a token, keeps the certificate fresh.

One for each master target that groups go to. Cycles wait until it has joined, so that no two of them use a
token at the same time. Not here: who may join (``replicator/enrolment.py``), and what is done with the
identity.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from pathlib import Path

from agents.daemon import Parts
from agents.text_file import read_text
from replicator.enrolment import join, keep_fresh
from replicator.errors import Remedy, ReplicatorError, TrustError
from replicator.health import Problem
from replicator.identity import Identities, Identity
from replicator.private_directory import PrivateDirectory
from replicator.tokens import Token, parse_token
from replicator.transport.dial import Address
from replicator.transport.tls import ALPN_HTTP, server_context

log = logging.getLogger(__name__)

LOOK_S = 60.0  # certificates live for days; cycles renew them, too
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0
REFUSED_S = 300.0  # what was refused for good is asked for again rarely: guesses are counted
TOKEN_MAX_BYTES = 4096


class Membership:
    """Our identity at one master target.

    Args:
        token_file: None: it has been joined before.
        state: where identities are kept.

    Attributes:
        joined: set once there is an identity.
        identity: the newest that is known.
        problem: what stands in the way, if anything.
    """

    def __init__(
        self, address: Address, token_file: Path | None, state: PrivateDirectory, parts: Parts
    ) -> None:
        self.joined = asyncio.Event()
        self.identity: Identity | None = None
        self.problem: Problem | None = None
        self.address = address
        self.token_file = token_file
        self._identities = Identities(state)
        self._parts = parts
        self._jitter = random.random()  # noqa: S311 - spreads renewals, guards nothing

    async def run(self) -> None:
        """Join, and renew when it is time, until cancelled. What fails is told, and tried again."""
        wait_s = FIRST_WAIT_S
        while True:
            try:
                await self._look()
            except ReplicatorError as error:
                self._note(error)
                wait_s = min(wait_s * 2, LONGEST_WAIT_S) if error.remedy is Remedy.RETRY else REFUSED_S
            else:
                self.problem = None
                self.joined.set()
                wait_s = FIRST_WAIT_S
            await asyncio.sleep(LOOK_S if self.problem is None else wait_s)

    async def _look(self) -> None:
        identities, workers, clock = self._identities, self._parts.workers, self._parts.clock
        identity = await workers.run(self._find)
        if identity is None:
            token = await workers.run(self._token)
            self.identity = await join(
                self.address, token, identities=identities, workers=workers, clock=clock
            )
            log.info("joined at %s as %s", self.address, self.identity.id)
            return
        self.identity = identity
        self.identity = await keep_fresh(
            identity, self.address, self._jitter, identities=identities, workers=workers, clock=clock
        )

    def _find(self) -> Identity | None:
        """The identity that we have there; by its token, where the target's address has changed. Blocks."""
        found = self._identities.find_by_address(str(self.address))
        if found is not None or self.token_file is None or not self.token_file.exists():
            return found
        found = self._identities.find(self._token().pin)
        return found and self._identities.remember(found, str(self.address))

    def _token(self) -> Token:
        if self.token_file is None:
            raise _no_token(self.address, "no token file is named for it under [[targets]]")
        try:
            return parse_token(read_text(self._parts.files, self.token_file, TOKEN_MAX_BYTES).strip())
        except (OSError, UnicodeDecodeError) as error:
            raise _no_token(
                self.address, f"the token file {self.token_file} cannot be read: {error}"
            ) from None

    def _note(self, error: ReplicatorError) -> None:
        log.warning("%s: %s", self.address, error)
        if self.problem is None or self.problem.code != error.code:
            self.problem = Problem.of(error, str(self.address), self._parts.clock.now())


class ShownIdentity:
    """The TLS context of a process server's own port: made anew when its certificate is."""

    def __init__(self) -> None:
        self._made: tuple[Identity, ssl.SSLContext] | None = None

    def context(self, identity: Identity | None) -> ssl.SSLContext:
        """The context that shows this identity; ``SSLError`` where there is none yet."""
        if identity is None:
            raise ssl.SSLError("no certificate yet: this server has not joined")
        if self._made is None or self._made[0] != identity:
            context = server_context(identity.credentials, identity.authority, (ALPN_HTTP,))
            self._made = (identity, context)
        return self._made[1]


def _no_token(address: Address, why: str) -> TrustError:
    return TrustError(
        "identity.missing",
        f"no identity for {address}",
        cause=f"this process server has not joined there, and {why}",
        fix="put a fresh join token into a file, name it under [[targets]], and reload",
    )
