"""Join tokens: their text, and the server's book of those it gave out.

A token proves once that its bearer may have an identity. Not here: the identity itself (``authority.py``) and
the conversation (``enrolment.py``). A secret is in the token's text and nowhere else: the book holds its
SHA-256 (it is 128 random bits: nothing to guess from a hash), and no error, log line or ``repr`` shows it.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
import zlib
from collections import deque
from dataclasses import dataclass, field, replace
from datetime import timedelta
from hashlib import sha256
from threading import Lock
from typing import Any

from replicator.certificates import ServerKind, kind_of, new_id
from replicator.clock import Clock
from replicator.errors import StateError, TrustError, UsageError
from replicator.failpoints import reach
from replicator.private_directory import (
    HeldDirectory,
    PrivateDirectory,
    checked_record,
    decode_record,
    encode_record,
)

PREFIX = "rpl1."  # to be found by secret scanners, and a version
ID_BYTES = 8
SECRET_BYTES = 16
PIN_BYTES = 32
CHECK_BYTES = 4
BODY_BYTES = ID_BYTES + SECRET_BYTES + PIN_BYTES
TEXT_CHARS = len(PREFIX) + (BODY_BYTES + CHECK_BYTES) * 4 // 3  # 60 bytes are 80 characters, without padding

LIFE = timedelta(hours=1)
TOKENS_MAX = 1000  # waiting at one time: a book of some 250 KB
GUESS_WINDOW_S = 600.0
GUESSES_PER_SOURCE = 10
GUESSES_IN_ALL = 100  # 128 bits need no more; it keeps a flood out of the log and off the disk

FILE = "tokens.json"
_BOOK_FIELDS = {"version": int, "tokens": list}
_ENTRY_FIELDS = {"id": str, "secret_sha256": str, "expires_s": int, "spki_sha256": str, "identity": str}
_VERSION = 1
_NOBODY = bytes(32)  # a hash that no secret has: unknown ids cost the same comparison

MAKE_ANOTHER = (
    "make a new token on the server (`replicator receive` prints one at its start, `replicator token create` "
    "makes more) and give it to this side with --token-file"
)


@dataclass(frozen=True, slots=True)
class Token:
    """What an operator carries from the server to the joining side. ``pin``: of the server's authority."""

    id: bytes
    pin: bytes
    secret: bytes = field(repr=False)

    def to_text(self) -> str:
        """``rpl1.`` and base64url without padding of id, secret, pin and the CRC-32 (big-endian) of these."""
        body = self.id + self.secret + self.pin
        return (
            PREFIX + base64.urlsafe_b64encode(body + zlib.crc32(body).to_bytes(CHECK_BYTES, "big")).decode()
        )


def parse_token(text: str) -> Token:
    """The token in a text, white space around it ignored.

    Raises:
        TrustError: ``join.token_malformed``; the text is not quoted.
    """
    text = text.strip()
    if not text.startswith(PREFIX):
        raise _malformed(f"it does not begin with {PREFIX}")
    if len(text) != TEXT_CHARS:
        raise _malformed(f"it has {len(text)} characters instead of {TEXT_CHARS}")
    try:
        standard = text.removeprefix(PREFIX).translate(_TO_STANDARD).encode("ascii")
        content = binascii.a2b_base64(standard, strict_mode=True)
    except (ValueError, UnicodeEncodeError):
        raise _malformed("it has characters that no token has") from None
    body, check = content[:BODY_BYTES], content[BODY_BYTES:]
    if zlib.crc32(body).to_bytes(CHECK_BYTES, "big") != check:
        raise _malformed("its checksum is wrong")
    secret_end = ID_BYTES + SECRET_BYTES
    return Token(id=body[:ID_BYTES], secret=body[ID_BYTES:secret_end], pin=body[secret_end:])


_TO_STANDARD = str.maketrans(
    "-_+/", "+/!!"
)  # "!" is in no alphabet: the standard one's own characters are refused


def _malformed(reason: str) -> TrustError:
    return TrustError(
        "join.token_malformed",
        f"the join token cannot be read: {reason}",
        cause="it was cut, wrapped or mistyped on its way",
        fix="copy the whole token again, from rpl1. to its end",
    )


@dataclass(frozen=True, slots=True)
class Entry:
    """What a server keeps of a token that it gave out.

    Attributes:
        expires_s: since 1970 UTC.
        spki_sha256: of the key that it is bound to; empty: not bound yet.
        identity: id that it gives.
    """

    id: bytes
    secret_sha256: bytes
    expires_s: int
    spki_sha256: bytes
    identity: str


class Guesses:
    """Wrong secrets of the last minutes, counted in memory. Safe in several threads."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._guard = Lock()
        self._wrong: deque[tuple[float, str]] = deque(
            maxlen=GUESSES_IN_ALL
        )  # (monotonic_s, source), oldest first

    def check(self, source: str) -> None:
        """Raises ``join.too_many_guesses`` when this source, or all together, have guessed too often."""
        since = self._clock.monotonic_s() - GUESS_WINDOW_S
        with self._guard:
            while self._wrong and self._wrong[0][0] < since:
                self._wrong.popleft()
            in_all = len(self._wrong)
            from_source = sum(guesser == source for _, guesser in self._wrong)
        if from_source >= GUESSES_PER_SOURCE or in_all >= GUESSES_IN_ALL:
            raise _too_many_guesses()

    def admit(self, entry: Entry | None, secret: bytes, spki: bytes, source: str) -> Entry:
        """The entry that was found for a token's id, bound to the key that asks; None: there is none.

        Raises:
            TrustError: ``join.secret_wrong`` (which is counted), ``join.token_expired``, ``join.token_used``.
        """
        expected = entry.secret_sha256 if entry else _NOBODY
        if not hmac.compare_digest(sha256(secret).digest(), expected) or entry is None:
            with self._guard:
                self._wrong.append((self._clock.monotonic_s(), source))
            raise _secret_wrong()
        if entry.expires_s <= self._clock.now().timestamp():
            raise _expired()
        if entry.spki_sha256 and not hmac.compare_digest(entry.spki_sha256, spki):
            raise _used()
        return replace(entry, spki_sha256=spki)


class TokenBook:
    """The tokens that a server gave out, in ``tokens.json`` of a directory.

    The file is the book: each call reads and replaces it under the directory's lock, so that a command may
    add tokens beside a running server. All methods block.

    Args:
        directory: where the book is.
        pin: SPKI SHA-256 of the authority that will sign.
        clock: for expiry, and for the window of wrong guesses (which are counted in memory, per process).
    """

    def __init__(self, directory: PrivateDirectory, pin: bytes, clock: Clock) -> None:
        self._directory = directory
        self._pin = pin
        self._clock = clock
        self._guesses = Guesses(clock)

    def create(self, kind: ServerKind, life: timedelta = LIFE) -> Token:
        """A new token for a server of this kind. Expired ones are dropped.

        Raises:
            UsageError: ``token.too_many``.
            StateError: ``token.book_damaged``; ``state.unusable``.
        """
        token = Token(secrets.token_bytes(ID_BYTES), self._pin, secrets.token_bytes(SECRET_BYTES))
        now = self._clock.now()
        with self._directory.held() as held:
            book = {key: entry for key, entry in _load(held).items() if entry.expires_s > now.timestamp()}
            if len(book) >= TOKENS_MAX:
                raise too_many()
            expires_s = int((now + life).timestamp())
            book[token.id] = Entry(token.id, sha256(token.secret).digest(), expires_s, b"", new_id(kind))
            _store(held, book)
        return token

    def redeem(self, token_id: bytes, secret: bytes, spki: bytes, source: str) -> str:
        """The identity id that a token stands for, once it is durably bound to the key that asks.

        Until the token expires the same key may come again (a join was killed half-way) and gets the same id.

        Args:
            token_id: 8 bytes.
            secret: 16 bytes.
            spki: SHA-256 of the key that asks, 32 bytes.
            source: where the request comes from, without its port; wrong guesses are counted by it.

        Raises:
            TrustError: ``join.too_many_guesses``, ``join.secret_wrong``, ``join.token_expired``,
                ``join.token_used``.
            StateError: ``token.book_damaged``; ``state.unusable``. The token is bound or not: ask again.
        """
        self._guesses.check(source)  # before anything touches the disk
        with self._directory.held() as held:
            book = _load(held)
            bound = self._guesses.admit(book.get(token_id), secret, spki, source)
            # Also when it is bound already: whoever bound it may have died before it was durable.
            book[token_id] = bound
            _store(held, book)
            reach("token.bound")
            return bound.identity


def _load(held: HeldDirectory) -> dict[bytes, Entry]:
    content = held.read(FILE)
    if content is None:
        return {}
    try:
        record = decode_record(content, _BOOK_FIELDS)
        if record["version"] != _VERSION:
            raise ValueError(f"version {record['version']} is not known")
        entries = [_entry(checked_record(item, _ENTRY_FIELDS)) for item in record["tokens"]]
    except ValueError as error:
        raise _damaged(held, error) from None
    return {entry.id: entry for entry in entries}


def _entry(record: dict[str, Any]) -> Entry:
    entry = Entry(
        bytes.fromhex(record["id"]),
        bytes.fromhex(record["secret_sha256"]),
        record["expires_s"],
        bytes.fromhex(record["spki_sha256"]),
        record["identity"],
    )
    if (len(entry.id), len(entry.secret_sha256)) != (ID_BYTES, 32) or len(entry.spki_sha256) not in (0, 32):
        raise ValueError("id, secret_sha256 or spki_sha256 is of the wrong length")
    kind_of(entry.identity)
    return entry


def _store(held: HeldDirectory, book: dict[bytes, Entry]) -> None:
    tokens = [
        {
            "id": entry.id.hex(),
            "secret_sha256": entry.secret_sha256.hex(),
            "expires_s": entry.expires_s,
            "spki_sha256": entry.spki_sha256.hex(),
            "identity": entry.identity,
        }
        for entry in book.values()
    ]
    held.replace(FILE, encode_record({"version": _VERSION, "tokens": tokens}))


def _damaged(held: HeldDirectory, error: ValueError) -> StateError:
    return StateError(
        "token.book_damaged",
        f"{held.path / FILE} cannot be used: {error}",
        cause="the file was edited, cut short or overwritten, or comes from a newer release",
        fix="move it away and make new tokens; servers that have joined are not affected",
    )


def too_many() -> UsageError:
    """``token.too_many``: TOKENS_MAX of them wait to be used."""
    return UsageError(
        "token.too_many",
        f"no further token: {TOKENS_MAX} are waiting to be used",
        cause="tokens were made and neither used nor left to expire",
        fix="use one of them, or wait until some have expired (an hour unless another life was asked for)",
    )


def _too_many_guesses() -> TrustError:
    return TrustError(
        "join.too_many_guesses",
        "the server refuses to look at join tokens for now",
        cause=f"within {GUESS_WINDOW_S / 60:.0f} minutes {GUESSES_PER_SOURCE} wrong secrets came from this "
        f"address, or {GUESSES_IN_ALL} from everywhere",
        fix=f"see in the server's log who asks; wait {GUESS_WINDOW_S / 60:.0f} minutes and try again",
    )


def _secret_wrong() -> TrustError:
    return TrustError(
        "join.secret_wrong",
        "the server does not know this join token",
        cause="it was made by another installation, its secret is wrong, or it expired and was dropped",
        fix=MAKE_ANOTHER,
    )


def _expired() -> TrustError:
    return TrustError(
        "join.token_expired",
        "the join token has expired",
        cause="tokens are good for a limited time, an hour unless another one was asked for",
        fix=MAKE_ANOTHER,
    )


def _used() -> TrustError:
    return TrustError(
        "join.token_used",
        "the join token was already used, with another key",
        cause="another server joined with it, or this one has lost its state directory since",
        fix=MAKE_ANOTHER
        + "; if nobody here used this one, somebody else has it: revoke the identity that it gave",
    )
