"""Joining through the command line: what is refused, what is survived, and that one token is enough."""

import os
import ssl
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from replicator import certificates
from replicator.certificates import Credentials, ServerKind
from replicator.clock import Clock
from replicator.enrolment import GRACE
from replicator.files import Files
from replicator.identity import Identities, Identity
from replicator.private_directory import PrivateDirectory
from replicator.tokens import PIN_BYTES, SECRET_BYTES, parse_token
from tests.agents.fake_peer import fake_target, joined
from tests.agents.harness import MIB, Target, identical, make_disk, receiving, send, tree
from tests.replicator.trust import Installation

KILLED = -9


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with receiving(tmp_path_factory.mktemp("shared") / "target") as target:
        yield target


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_disk(tmp_path / f"disk-{os.urandom(4).hex()}.img", MIB)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def fresh_token(target: Target, life: timedelta = timedelta(hours=1)) -> str:
    tokens = Installation(target.retention, Clock()).tokens
    return tokens.create(ServerKind.PROCESS_SERVER, life).to_text()


def identity_at(state: Path, target: Target) -> Identity:
    found = Identities(PrivateDirectory(Files(), state)).find_by_address(target.address)
    assert found is not None
    return found


# ------------------------------------------------------------------ refused


def test_a_wrong_secret_is_refused(target: Target, source: Path, state: Path) -> None:
    wrong = replace(parse_token(target.token), secret=os.urandom(SECRET_BYTES)).to_text()
    done = send(source, target.address, state, token=wrong)
    assert (done.error["code"], done.status) == ("join.secret_wrong", 1)


def test_the_token_of_another_installation_is_refused_before_its_secret_is_sent(
    target: Target, source: Path, state: Path
) -> None:
    foreign = replace(parse_token(target.token), pin=os.urandom(PIN_BYTES)).to_text()
    done = send(source, target.address, state, token=foreign)
    assert (done.error["code"], done.status) == ("join.wrong_pin", 1)
    assert "nothing secret was sent" in done.error["message"]


def test_an_expired_token_is_refused(target: Target, source: Path, state: Path) -> None:
    expired = fresh_token(target, life=timedelta(seconds=-1))
    done = send(source, target.address, state, token=expired)
    assert (done.error["code"], done.status) == ("join.token_expired", 1)


def test_a_token_that_another_key_used_is_refused(target: Target, source: Path, state: Path) -> None:
    token = fresh_token(target)
    assert send(source, target.address, state, token=token).ok
    done = send(source, target.address, state.with_name("another"), token=token)
    assert (done.error["code"], done.status) == ("join.token_used", 1)


@pytest.mark.parametrize("code", ["join.secret_wrong", "join.wrong_pin"])
def test_no_refusal_shows_a_secret(code: str, target: Target, source: Path, state: Path) -> None:
    given = parse_token(target.token)
    change = (
        {"secret": os.urandom(SECRET_BYTES)} if code == "join.secret_wrong" else {"pin": bytes(PIN_BYTES)}
    )
    wrong = replace(given, **change)
    done = send(source, target.address, state, token=wrong.to_text())
    assert done.error["code"] == code
    for secret in (wrong.to_text(), wrong.secret.hex()):
        assert secret not in done.stdout + done.stderr


# ------------------------------------------------------------------ identities


def test_with_an_identity_no_token_is_needed_and_any_secret_is_ignored(
    target: Target, source: Path, state: Path
) -> None:
    assert send(source, target.address, state, token=fresh_token(target)).ok
    before = identity_at(state, target).credentials
    assert send(source, target.address, state).ok
    garbage = replace(parse_token(target.token), secret=os.urandom(SECRET_BYTES)).to_text()
    assert send(source, target.address, state, token=garbage).ok
    assert identity_at(state, target).credentials == before
    assert identical(source, target.directory / f"{source.stem}.vmdk")


def test_another_installation_at_the_same_address_is_not_trusted(
    tmp_path: Path, source: Path, state: Path
) -> None:
    with receiving(tmp_path / "first") as first:
        assert send(source, first.address, state, token=first.token).ok
        address, _ = first.address, first.stop()
    with receiving(tmp_path / "second", listen=address) as second:
        done = send(source, address, state)
        assert (done.error["code"], done.status) == ("identity.server_not_trusted", 1)
        assert tree(second.directory) == {}
        # What the error tells to do helps.
        assert send(source, address, state, token=second.token).ok


def aged(identity: Identity, installation: Installation, issued: timedelta) -> Identity:
    """The identity with a certificate that was issued so long ago."""
    key = certificates.new_key()
    certificate = installation.authority.issue(key.public_key(), identity.id, Clock().now() - issued)
    return replace(identity, credentials=Credentials(certificate, certificates.key_to_pem(key)))


def age(state: Path, target: Target, issued: timedelta) -> None:
    old = aged(identity_at(state, target), Installation(target.retention, Clock()), issued)
    Identities(PrivateDirectory(Files(), state)).store(old)


@pytest.mark.parametrize("days", [5, 8, 7 + GRACE.days - 1], ids=["due", "expired", "grace"])
def test_a_certificate_at_or_past_its_end_renews_by_itself(
    days: int, target: Target, source: Path, state: Path
) -> None:
    assert send(source, target.address, state, token=fresh_token(target)).ok
    before = identity_at(state, target)
    age(state, target, timedelta(days=days + 0.3))  # 5.3 of 7 days is past every jitter of the renewal
    assert send(source, target.address, state).ok
    after = identity_at(state, target)
    assert after.id == before.id
    assert after.expires > datetime.now(UTC) + timedelta(days=6)


def test_a_certificate_beyond_its_grace_says_so(target: Target, source: Path, state: Path) -> None:
    assert send(source, target.address, state, token=fresh_token(target)).ok
    age(state, target, timedelta(days=7 + GRACE.days + 1))
    done = send(source, target.address, state)
    assert (done.error["code"], done.status) == ("identity.expired_beyond_grace", 1)


def test_closed_before_welcome_names_the_likely_causes(tmp_path: Path, source: Path, state: Path) -> None:
    def close_at_once(sock: ssl.SSLSocket) -> None:
        sock.close()

    installation = Installation(tmp_path / "installation", Clock())
    with fake_target(installation, close_at_once) as address:
        joined(installation, address, state)
        done = send(source, address, state)
    assert (done.error["code"], done.status) == ("link.closed_before_welcome", 1)
    for likely in ("expired", "revoked", "clock", "installed anew"):
        assert likely in done.error["cause"]


# ------------------------------------------------------------------ killed half-way


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("failpoint", ["join.key_stored", "join.received", "join.stored"])
def test_a_sender_killed_while_it_joins_joins_by_the_same_command(
    failpoint: str, target: Target, source: Path, state: Path
) -> None:
    token = fresh_token(target)
    killed = send(source, target.address, state, token=token, failpoint=failpoint)
    assert (killed.status, killed.stdout) == (KILLED, "")
    assert send(source, target.address, state, token=token).ok
    assert identical(source, target.directory / f"{source.stem}.vmdk")


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("failpoint", ["token.bound", "join.before_answer", "join.answered"])
def test_a_target_killed_while_a_sender_joins_knows_it_and_its_token_after_a_restart(
    failpoint: str, tmp_path: Path, source: Path, state: Path
) -> None:
    with receiving(tmp_path / "target", failpoint=failpoint) as first:
        token, address = first.token, first.address
        failed = send(source, address, state, token=token)
        assert failed.error["code"].startswith("link.")
        assert first.process.wait().status == KILLED
    with receiving(tmp_path / "target", listen=address) as second:
        assert send(source, address, state, token=token).ok
        assert identical(source, second.directory / f"{source.stem}.vmdk")
        other = send(source, address, state.with_name("another"), "--disk", "other", token=token)
        assert other.error["code"] == "join.token_used"


@pytest.mark.parametrize("failpoint", ["authority.before_store", "authority.stored"])
def test_a_target_killed_while_it_makes_its_authority_starts_again(
    failpoint: str, tmp_path: Path, source: Path, state: Path
) -> None:
    with receiving(tmp_path / "target", failpoint=failpoint) as first:
        assert (first.token, first.process.wait().status) == ("", KILLED)
    with receiving(tmp_path / "target") as second:
        assert send(source, second.address, state, token=second.token).ok
