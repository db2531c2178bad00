"""Tokens: their text survives copying or is refused, and the book gives one identity to one key."""

import json
import random
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from os import environ
from pathlib import Path

import pytest

from replicator.certificates import ServerKind
from replicator.errors import ReplicatorError, StateError, TrustError
from replicator.files import Files
from replicator.private_directory import PrivateDirectory
from replicator.tokens import (
    FILE,
    GUESS_WINDOW_S,
    GUESSES_IN_ALL,
    GUESSES_PER_SOURCE,
    TOKENS_MAX,
    Token,
    TokenBook,
    parse_token,
)
from tests.replicator.test_private_directory import FailingSync
from tests.replicator.trust import ROOT, SetClock, mode_of, refused

PIN = bytes(range(32))
KEY, OTHER_KEY = b"k" * 32, b"o" * 32
HERE = "192.0.2.1"


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def book(tmp_path: Path, clock: SetClock) -> TokenBook:
    return TokenBook(PrivateDirectory(Files(), tmp_path), PIN, clock)


def redeem(book: TokenBook, token: Token, key: bytes = KEY, source: str = HERE) -> str:
    return book.redeem(token.id, token.secret, key, source)


# ------------------------------------------------------------------ the text


def test_a_token_is_read_back_from_its_text_with_white_space_around_it(book: TokenBook) -> None:
    token = book.create(ServerKind.PROCESS_SERVER)
    text = token.to_text()
    assert re.fullmatch(r"rpl1\.[A-Za-z0-9_-]{80}", text)
    assert parse_token(f"  {text}\r\n") == token
    assert token.pin == PIN
    assert len(token.secret) * 8 >= 128


def test_the_text_of_a_known_token_is_stable() -> None:
    token = Token(id=bytes(range(8)), secret=bytes(range(100, 116)), pin=b"\xff" * 32)
    text = "rpl1.AAECAwQFBgdkZWZnaGlqa2xtbm9wcXJz" + "_" * 43 + "1lScU"
    assert token.to_text() == text
    assert parse_token(text) == token


def test_every_single_typing_error_is_caught(book: TokenBook) -> None:
    text = book.create(ServerKind.PROCESS_SERVER).to_text()
    for place in range(len(text)):
        for wrong in "A1_-+/= é!":
            if wrong != text[place]:
                with refused("join.token_malformed"):
                    parse_token(text[:place] + wrong + text[place + 1 :] + ("." if wrong == " " else ""))
    for place in range(len(text) - 1):
        if text[place] != text[place + 1]:
            with refused("join.token_malformed"):
                parse_token(text[:place] + text[place + 1] + text[place] + text[place + 2 :])


@pytest.mark.parametrize(
    "cut", ["", "rpl1.", "rpl2." + "A" * 80, "rpl1." + "A" * 79, "rpl1." + "A" * 81, "rpl1." + "=" * 80]
)
def test_what_is_no_token_is_refused(cut: str) -> None:
    with refused("join.token_malformed"):
        parse_token(cut)


def test_the_refusal_of_a_mistyped_token_quotes_nothing_of_it(book: TokenBook) -> None:
    text = book.create(ServerKind.PROCESS_SERVER).to_text()
    for wrong in (text[:-1], text[:-1] + "!", text[1:], text[:-1] + ("A" if text[-1] != "A" else "B")):
        with refused("join.token_malformed") as caught:
            parse_token(wrong)
        assert text[10:20] not in str(caught.value) + repr(caught.value)
        assert caught.value.__context__ is None or caught.value.__suppress_context__


# ------------------------------------------------------------------ the book


def test_a_token_gives_an_identity_of_the_kind_it_was_made_for(book: TokenBook) -> None:
    for kind in ServerKind:
        assert redeem(book, book.create(kind)).startswith(f"{kind}-")


def test_the_same_key_gets_the_same_identity_again_and_another_key_none(book: TokenBook) -> None:
    token = book.create(ServerKind.PROCESS_SERVER)
    identity = redeem(book, token)
    assert redeem(book, token) == identity
    with refused("join.token_used") as caught:
        redeem(book, token, OTHER_KEY)
    assert isinstance(caught.value, TrustError)
    assert redeem(book, token) == identity


def test_the_binding_outlives_the_process_and_is_in_the_file_before_the_answer(tmp_path, clock) -> None:
    first = TokenBook(PrivateDirectory(Files(), tmp_path), PIN, clock)
    token = first.create(ServerKind.PROCESS_SERVER)
    identity = redeem(first, token)
    [entry] = json.loads((tmp_path / FILE).read_bytes())["tokens"]
    assert entry["spki_sha256"] == KEY.hex()
    second = TokenBook(PrivateDirectory(Files(), tmp_path), PIN, clock)
    assert redeem(second, token) == identity
    with refused("join.token_used"):
        redeem(second, token, OTHER_KEY)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_no_identity_is_given_when_the_binding_may_not_be_durable(tmp_path: Path, clock, at: int) -> None:
    good = TokenBook(PrivateDirectory(Files(), tmp_path), PIN, clock)
    token = good.create(ServerKind.PROCESS_SERVER)
    with refused("state.unusable"):
        redeem(TokenBook(PrivateDirectory(FailingSync(at), tmp_path), PIN, clock), token)
    # At the third fsync the binding is visible, perhaps not durable: the same key must not slip through.
    with refused("state.unusable"):
        redeem(TokenBook(PrivateDirectory(FailingSync(at), tmp_path), PIN, clock), token)
    assert redeem(good, token)


CHILD = (
    "import sys, pathlib\n"
    "from replicator.clock import Clock\n"
    "from replicator.files import Files\n"
    "from replicator.private_directory import PrivateDirectory\n"
    "from replicator.tokens import TokenBook, parse_token\n"
    "token = parse_token(sys.stdin.read())\n"
    "book = TokenBook(PrivateDirectory(Files(), pathlib.Path(sys.argv[1])), token.pin, Clock())\n"
    "print(book.redeem(token.id, token.secret, sys.argv[2].encode(), 'here'))\n"
)


@pytest.mark.parametrize(
    ("failpoint", "bound"),
    [("replace.before_rename", False), ("replace.before_fsync_dir", True), ("token.bound", True)],
)
def test_killed_while_binding_the_first_key_that_was_bound_has_it(tmp_path, clock, failpoint, bound) -> None:
    book = TokenBook(PrivateDirectory(Files(), tmp_path), PIN, clock)
    token = book.create(ServerKind.PROCESS_SERVER)
    killed = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), KEY.decode()],
        input=token.to_text(),
        text=True,
        capture_output=True,
        env={**environ, "FAILPOINT": failpoint},
        cwd=ROOT,
        check=False,
    )
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "")
    if bound:
        with refused("join.token_used"):
            redeem(book, token, OTHER_KEY)
        assert redeem(book, token, KEY)
    else:
        assert redeem(book, token, OTHER_KEY)


def test_of_many_keys_at_once_exactly_one_is_bound(tmp_path: Path, clock: SetClock) -> None:
    books = [TokenBook(PrivateDirectory(Files(), tmp_path), PIN, clock) for _ in range(2)]
    token = books[0].create(ServerKind.PROCESS_SERVER)

    def attempt(number: int) -> str | None:
        try:
            return redeem(books[number % 2], token, bytes([number]) * 32, f"192.0.2.{number}")
        except TrustError as error:
            assert error.code == "join.token_used"
            return None

    with ThreadPoolExecutor(8) as threads:
        winners = [identity for identity in threads.map(attempt, range(32)) if identity]
    assert len(winners) == 1


def test_a_token_expires_after_its_life_for_its_own_key_too(book: TokenBook, clock: SetClock) -> None:
    token = book.create(ServerKind.PROCESS_SERVER, timedelta(minutes=5))
    usual = book.create(ServerKind.PROCESS_SERVER)
    redeem(book, token)
    clock.advance(timedelta(minutes=4, seconds=58))
    redeem(book, token)
    clock.advance(timedelta(seconds=2))
    with refused("join.token_expired"):
        redeem(book, token)
    clock.advance(timedelta(minutes=54))
    redeem(book, usual)
    clock.advance(timedelta(minutes=2))
    with refused("join.token_expired"):
        redeem(book, usual)


def test_expired_tokens_leave_the_book_when_another_is_made(
    tmp_path, book: TokenBook, clock: SetClock
) -> None:
    old = book.create(ServerKind.PROCESS_SERVER)
    clock.advance(timedelta(hours=1, seconds=1))
    new = book.create(ServerKind.PROCESS_SERVER)
    entries = json.loads((tmp_path / FILE).read_bytes())["tokens"]
    assert [entry["id"] for entry in entries] == [new.id.hex()]
    with refused("join.secret_wrong"):
        redeem(book, old)


def test_an_unknown_id_and_a_wrong_secret_are_refused_alike(book: TokenBook) -> None:
    token = book.create(ServerKind.PROCESS_SERVER)
    texts = []
    for wrong in (Token(b"x" * 8, PIN, token.secret), Token(token.id, PIN, b"x" * 16)):
        with refused("join.secret_wrong") as caught:
            redeem(book, wrong)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_guesses_from_one_source_are_limited_and_others_are_not_hindered(
    book: TokenBook, clock: SetClock
) -> None:
    token = book.create(ServerKind.PROCESS_SERVER)
    wrong = Token(token.id, PIN, b"x" * 16)
    for _ in range(GUESSES_PER_SOURCE):
        with refused("join.secret_wrong"):
            redeem(book, wrong)
    with refused("join.too_many_guesses"):
        redeem(book, token)  # the right secret too: else the limit would tell which one it is
    redeem(book, token, source="192.0.2.2")
    clock.advance(timedelta(seconds=GUESS_WINDOW_S + 1))
    redeem(book, token)


def test_guesses_from_everywhere_are_limited_and_remembered_in_bounded_space(book: TokenBook, clock) -> None:
    token = book.create(ServerKind.PROCESS_SERVER)
    wrong = Token(token.id, PIN, b"x" * 16)
    codes = []
    for number in range(GUESSES_IN_ALL + 50):
        with pytest.raises(ReplicatorError) as caught:
            redeem(book, wrong, source=f"198.51.100.{number}")
        codes.append(caught.value.code)
    assert codes == ["join.secret_wrong"] * GUESSES_IN_ALL + ["join.too_many_guesses"] * 50
    assert len(book._guesses._wrong) == GUESSES_IN_ALL
    with refused("join.too_many_guesses"):
        redeem(book, token)
    clock.advance(timedelta(seconds=GUESS_WINDOW_S + 1))
    redeem(book, token)


def test_used_and_expired_tokens_are_no_guesses(book: TokenBook, clock: SetClock) -> None:
    token = book.create(ServerKind.PROCESS_SERVER)
    redeem(book, token)
    for _ in range(GUESSES_PER_SOURCE + 1):
        with refused("join.token_used"):
            redeem(book, token, OTHER_KEY)
    redeem(book, token)


def test_the_book_is_private_and_holds_no_secret(tmp_path: Path, book: TokenBook) -> None:
    token = book.create(ServerKind.PROCESS_SERVER)
    redeem(book, token)
    assert mode_of(tmp_path / FILE) == 0o600
    content = (tmp_path / FILE).read_text()
    assert token.secret.hex() not in content
    assert token.to_text()[16:36] not in content


def test_a_token_shows_its_secret_in_its_text_only(book: TokenBook) -> None:
    token = book.create(ServerKind.PROCESS_SERVER)
    for shown in (repr(token), str(token), f"{token}"):
        assert repr(token.secret)[2:-1] not in shown
        assert token.secret.hex() not in shown
        assert token.to_text() not in shown


def test_waiting_tokens_are_limited(tmp_path: Path, book: TokenBook, clock: SetClock) -> None:
    book.create(ServerKind.PROCESS_SERVER)
    record = json.loads((tmp_path / FILE).read_bytes())
    [entry] = record["tokens"]
    record["tokens"] = [{**entry, "id": f"{number:016x}"} for number in range(TOKENS_MAX)]
    (tmp_path / FILE).write_text(json.dumps(record))
    with refused("token.too_many"):
        book.create(ServerKind.PROCESS_SERVER)
    clock.advance(timedelta(hours=2))
    book.create(ServerKind.PROCESS_SERVER)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: {**record, "version": 2},
        lambda record: {**record, "more": 1},
        lambda record: {**record, "tokens": [1]},
        lambda record: {**record, "tokens": [{**record["tokens"][0], "more": 1}]},
        lambda record: {**record, "tokens": [{**record["tokens"][0], "id": "00"}]},
        lambda record: {**record, "tokens": [{**record["tokens"][0], "expires_s": "never"}]},
        lambda record: {**record, "tokens": [{**record["tokens"][0], "identity": "root"}]},
        lambda record: {**record, "tokens": [{**record["tokens"][0], "spki_sha256": "zz"}]},
    ],
)
def test_a_book_of_another_shape_is_damage_and_left_alone(tmp_path: Path, book: TokenBook, change) -> None:
    token = book.create(ServerKind.PROCESS_SERVER)
    damaged = json.dumps(change(json.loads((tmp_path / FILE).read_bytes())))
    (tmp_path / FILE).write_text(damaged)
    for call in (lambda: redeem(book, token), lambda: book.create(ServerKind.PROCESS_SERVER)):
        with refused("token.book_damaged") as caught:
            call()
        assert isinstance(caught.value, StateError)
    assert (tmp_path / FILE).read_text() == damaged


def test_random_bytes_never_redeem(book: TokenBook, clock: SetClock, seed: int) -> None:
    rng = random.Random(seed)
    token = book.create(ServerKind.PROCESS_SERVER)
    for _ in range(200):
        clock.advance(timedelta(seconds=GUESS_WINDOW_S + 1))
        with pytest.raises(TrustError):
            book.redeem(token.id, rng.randbytes(16), KEY, HERE)
