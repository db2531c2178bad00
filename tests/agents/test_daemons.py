"""The daemons as services: groups by their intervals, kills, a drained end, a configuration anew."""

import asyncio
import json
import random
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from agents import desired_state
from protocol.messages import Bye
from replicator import desired
from replicator.certificates import host_name
from replicator.desired import Desired, Disk, Group
from replicator.files import Files
from replicator.private_directory import PrivateDirectory
from replicator.transport.tls import client_context
from tests.agents.daemons import Running, Site, context
from tests.agents.harness import BOUND_S, MIB, identical, make_disk, run
from tests.replicator.pipeline import Peer, call
from tests.replicator.web_client import WebClient

pytestmark = pytest.mark.peer("qemu-img")

SEALED = "is sealed"
BEGINS = "a cycle begins"
OVERDUE = "what is still under way is ended"
SLOW_CLIENTS = 40


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    return [make_disk(tmp_path / "system.img", 6 * MIB), make_disk(tmp_path / "data.img", 2 * MIB + 512)]


@pytest.fixture
def target(site: Site) -> Iterator[Running]:
    with site.target() as running:
        yield running


def scribble(path: Path, seed: int) -> None:
    with path.open("r+b") as file:
        file.seek(random.Random(seed).randrange(path.stat().st_size // 4096) * 4096)
        file.write(random.Random(seed).randbytes(4096))


def sealed_anew(server: Running, *, cycles: int = 1) -> None:
    """Wait until so many cycles that begin from now on are sealed."""
    said = server.heard.count(BEGINS)
    server.process.said(BEGINS, times=said + cycles)
    server.process.said(SEALED, times=server.heard.count(SEALED) + 1)


def arrived(site: Site, sources: list[Path]) -> bool:
    return all(identical(source, site.directory / f"{source.stem}.vmdk") for source in sources)


def stopped(running: Running) -> list[dict[str, str]]:
    """End it as an operator does; its log."""
    running.process.signal(signal.SIGTERM)
    assert running.process.wait().status == 0, running.process.wait()
    assert "trace" not in running.process.wait().stderr
    return running.lines()


# ------------------------------------------------------------------ groups by their intervals


def test_a_group_is_replicated_by_its_interval(
    site: Site, target: Running, sources: list[Path], seed: int
) -> None:
    with site.process_server([site.group("web", *sources)]) as server:
        server.process.said(SEALED)
        assert arrived(site, sources)
        scribble(sources[1], seed)
        sealed_anew(server)
        assert arrived(site, sources)
        log = stopped(server)
    ends = [line for line in log if SEALED in line["message"]]
    assert "full" in ends[0]["message"] and "incremental" in ends[1]["message"]
    assert {line["group"] for line in ends} == {"web"}
    assert len({line["cycle"] for line in ends}) == len(ends)
    begins = [line["time"] for line in log if line["message"] == BEGINS]
    assert len(begins) == len(set(begins)) >= 2
    peers = [line for line in stopped(target) if line["logger"] == "replicator.session"]
    assert peers and all(line["stream"] and line["peer"] for line in peers)


def test_who_is_killed_goes_on_where_it_was(site: Site, sources: list[Path], seed: int) -> None:
    groups = lambda: [site.group("web", *sources)]  # noqa: E731 - the address is known once the target runs
    with site.target() as target:
        with site.process_server(groups()) as server:
            server.process.said(SEALED)
            server.process.signal(signal.SIGKILL)
            server.process.wait()
        scribble(sources[0], seed)
        with site.process_server(groups()) as server:
            server.process.said(SEALED)
            assert arrived(site, sources)
            assert "incremental" in server.heard
            target.process.signal(signal.SIGKILL)
            target.process.wait()
            scribble(sources[1], seed + 1)
            server.process.said("trying again in")
            with site.target():
                sealed_anew(server)
                assert arrived(site, sources)
                assert "full" not in server.heard
                stopped(server)


def test_a_group_that_fails_is_told_and_keeps_no_other_waiting(
    site: Site, target: Running, sources: list[Path]
) -> None:
    late = sources[1].with_name("late.img")
    groups = [site.group("late", late), site.group("web", sources[0])]
    with site.process_server(groups, more={"at_once": 1}) as server:
        server.process.said(SEALED)
        server.process.said("the cycle failed", times=2)
        ready = site.get(server, "/readyz")
        (problem,) = ready.document["problems"]
        assert (ready.status, problem["on"], problem["code"]) == (200, "late", "source.missing")
        make_disk(late, MIB)
        server.process.said('"group": "late", "cycle"')
        server.process.until(lambda: not site.get(server, "/readyz").document["problems"])
        assert arrived(site, [late, sources[0]])
        stopped(server)


def test_the_groups_of_a_kept_document_are_served(site: Site, target: Running, sources: list[Path]) -> None:
    disks = tuple(Disk(source.stem, str(source)) for source in sources)
    group = Group("web", disks, desired.Peer(str(site.address)), interval_s=1.0)
    state = PrivateDirectory(Files(), site.state)
    desired_state.keep(state, Desired(1, (group,)))
    with site.process_server(None) as server:
        server.process.said(SEALED)
        assert arrived(site, sources)
        assert site.get(server, "/readyz").status == 200
        desired_state.keep(state, Desired(2, (group,), revoked=(site.identity().id,)))
        server.process.signal(signal.SIGHUP)
        server.process.said("was read again")
        revoked = site.get(server, "/readyz")
        assert (revoked.status, revoked.document["code"]) == (403, "identity.revoked")
        stopped(server)
    (site.state / desired_state.FILE).write_text("{}")
    done = run("process-server", "--config", site.server_config, "--json")
    assert (done.status, done.error["code"]) == (1, "desired.damaged")


def test_a_start_that_cannot_be_is_told(site: Site, target: Running) -> None:
    site.target_config.write_text(site.target_config.read_text().replace("datastore", "elsewhere"))
    done = run("master-target", "--config", site.target_config, "--json")
    assert (done.status, done.error["code"]) == (1, "target.missing")
    site.configure([], more={"listen": str(target.address)})
    done = run("process-server", "--config", site.server_config, "--json")
    assert (done.status, done.error["code"]) == (1, "listen.port_taken")


def test_the_token_is_in_no_log(site: Site, target: Running, sources: list[Path]) -> None:
    token = site.token_file.read_text().strip()
    assert site.token_file.stat().st_mode & 0o777 == 0o600
    with site.process_server([site.group("web", *sources)], more={"log": {"level": "debug"}}) as server:
        server.process.said(SEALED)
        server.process.signal(signal.SIGTERM)
        done = server.process.wait()
    stopped(target)
    assert token.startswith("rpl1.") and token not in done.stderr + target.process.wait().stderr


# ------------------------------------------------------------------ a drained end


def test_a_cycle_under_way_may_end_in_order(site: Site, target: Running, sources: list[Path]) -> None:
    with site.process_server([site.group("web", *sources)]) as server:
        server.process.said(SEALED)
        target.process.signal(signal.SIGSTOP)  # so that the next cycle cannot end yet
        server.process.said(BEGINS, times=server.heard.count(BEGINS) + 1)
        sealed = server.heard.count(SEALED)
        server.process.signal(signal.SIGTERM)
        server.process.said("draining")
        target.process.signal(signal.SIGCONT)
        assert server.process.wait().status == 0
        assert server.heard.count(SEALED) == sealed + 1
        assert OVERDUE not in server.heard
        assert server.lines()[-1]["message"].startswith("stopped")


@pytest.mark.parametrize("how", ["deadline", "second signal"])
def test_a_drain_has_an_end(site: Site, target: Running, sources: list[Path], how: str) -> None:
    drain_s = 0.3 if how == "deadline" else 600
    with site.process_server([site.group("web", *sources)], more={"drain_s": drain_s}) as server:
        server.process.said(SEALED)
        target.process.signal(signal.SIGSTOP)
        try:
            server.process.said(BEGINS, times=server.heard.count(BEGINS) + 1)
            server.process.signal(signal.SIGTERM)
            server.process.said("draining")
            if how == "second signal":
                server.process.signal(signal.SIGINT)
            assert server.process.wait().status == 0
            assert OVERDUE in server.heard
        finally:
            target.process.signal(signal.SIGCONT)
    with site.process_server([site.group("web", *sources)]) as server:
        server.process.said(SEALED)
        assert arrived(site, sources)
        stopped(server)


def test_a_master_target_waits_for_its_sessions(site: Site, target: Running, sources: list[Path]) -> None:
    with site.process_server([site.group("web", *sources)]) as server:
        server.process.said(SEALED)
        stopped(server)

    async def drained() -> None:
        identity = site.identity()
        tls = client_context(identity.credentials, identity.authority)
        peer = await call(site.address, tls, host_name(identity.server))
        await peer.greet()
        target.process.signal(signal.SIGTERM)
        await asyncio.to_thread(target.process.said, "draining")
        with pytest.raises(OSError):
            await asyncio.open_connection(*site.address)
        await peer.open({"late": 4096}, group="late")  # whoever is in is served
        await goodbye(peer)

    asyncio.run(drained())
    assert target.process.wait().status == 0
    assert OVERDUE not in target.heard


async def goodbye(peer: Peer) -> None:
    peer.send(Bye())
    peer.close()
    await peer.ended()


# ------------------------------------------------------------------ a configuration anew


def test_a_new_group_is_taken_and_the_others_go_on(site: Site, target: Running, sources: list[Path]) -> None:
    with site.process_server([site.group("web", sources[0], interval_s=3600)]) as server:
        server.process.said(SEALED)
        site.configure([site.group("web", sources[0], interval_s=3600), site.group("db", sources[1])])
        server.process.signal(signal.SIGHUP)
        server.process.said('"group": "db"')
        server.process.said(SEALED, times=2)
        assert arrived(site, sources)
        assert server.heard.count(f'"{BEGINS}", "group": "web"') == 1  # it was not begun anew
        site.configure([site.group("db", sources[1])])
        server.process.signal(signal.SIGHUP)
        server.process.said("was read again", times=2)
        assert ("replicator_cycles_total", "web", "sealed") not in site.metrics(server)
        stopped(server)


def test_a_wrong_configuration_changes_nothing(site: Site, target: Running, sources: list[Path]) -> None:
    with site.process_server([site.group("web", *sources)]) as server:
        server.process.said(SEALED)
        site.configure([site.group("web", *sources, intervall_s=1)])
        server.process.signal(signal.SIGHUP)
        server.process.said("config.invalid")
        site.configure([site.group("web", *sources)], more={"at_once": 7})
        server.process.signal(signal.SIGHUP)
        server.process.said("config.needs_restart")
        sealed_anew(server)
        stopped(server)


def test_a_master_target_leaves_a_fresh_token_when_asked(site: Site, target: Running) -> None:
    token = site.token_file.read_text()
    target.process.signal(signal.SIGHUP)
    target.process.said("was read again")
    assert site.token_file.read_text() != token
    site.target_config.write_text(site.target_config.read_text().replace("datastore", "elsewhere"))
    target.process.signal(signal.SIGHUP)
    target.process.said("config.needs_restart")
    stopped(target)


def test_another_token_is_taken_on_reload(site: Site, target: Running, sources: list[Path]) -> None:
    good = site.token_file.read_text()
    site.token_file.write_text("rpl1.nonsense\n")
    with site.process_server([site.group("web", *sources)]) as server:
        server.process.said("join.token_malformed")
        site.token_file.write_text(good)
        server.process.signal(signal.SIGHUP)
        server.process.said(SEALED)
        stopped(server)


# ------------------------------------------------------------------ health


def test_both_daemons_answer_for_their_health(site: Site, target: Running, sources: list[Path]) -> None:
    with site.process_server([site.group("web", *sources)]) as server:
        server.process.said(SEALED)
        for running in (server, target):
            assert site.get(running, "/healthz", known=False).body == b"alive\n"
            for path in ("/readyz", "/metrics"):
                assert site.get(running, path, known=False).status == 401
                assert site.get(running, path).status == 200
        size = sum(source.stat().st_size for source in sources)
        found = site.metrics(server)
        assert found["replicator_group_lag_seconds", "web"] < BOUND_S
        assert found["replicator_cycles_total", "web", "sealed"] >= 1
        assert found["replicator_bytes_total", "web", "read"] >= size
        assert found["replicator_bytes_total", "web", "sent"] >= size
        assert found["replicator_free_bytes", "state"] > 0
        expires = found["replicator_certificate_expires_timestamp_seconds", str(site.address)]
        assert expires - time.time() > 6 * 86400
        found = site.metrics(target)
        assert found["replicator_free_bytes", "datastore"] > 0
        assert found["replicator_free_bytes", "retention"] > 0
        assert found["replicator_handshakes_total", "accepted"] > 4
        assert found["replicator_groups",] == 1
        stopped(server)


def test_before_it_has_joined_a_process_server_has_nothing_to_show(site: Site, sources: list[Path]) -> None:
    site.address = site.address._replace(port=9)  # discard: nobody listens
    site.token_file.parent.mkdir()
    site.token_file.write_text("nonsense")
    with site.process_server([site.group("web", *sources)]) as server:
        server.process.said("join.token_malformed")
        with socket.create_connection(server.address) as sock, suppress(ConnectionResetError):
            assert sock.recv(1) == b""
        stopped(server)


def test_slow_clients_keep_no_frame_waiting(site: Site, target: Running, sources: list[Path]) -> None:
    """They hold their connections, say half a request or do not read the answer, while groups replicate."""
    with site.process_server([site.group("web", *sources, interval_s=1)]) as server:
        server.process.said(SEALED)

        async def slow() -> None:
            clients = []
            for number in range(SLOW_CLIENTS):
                tls = context(site.identity(), known=number % 2 == 0)
                client = await WebClient.dial(site.address, tls, "")
                client.writer.write(b"GET /metrics HTTP/1.1\r\nHost: a\r\n" + b"\r\n" * (number % 2 == 0))
                clients.append(client)
            await asyncio.to_thread(sealed_anew, server, cycles=2)
            for client in clients:
                client.close()

        asyncio.run(slow())
        stopped(server)


# ------------------------------------------------------------------ the service manager


def told(notify: socket.socket, line: str) -> None:
    """Wait until the service manager has been told this."""
    while line not in notify.recv(4096).decode().splitlines():
        pass


@pytest.mark.parametrize("kind", ["target", "process server"])
def test_the_service_manager_is_told_how_it_goes(site: Site, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "notify"
    how = {"environment": {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "200000"}}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(path))
        notify.settimeout(BOUND_S)
        with site.target(**how) if kind == "target" else site.process_server([], **how) as running:
            assert notify.recv(4096).decode().startswith("READY=1\nSTATUS=serving")
            for _ in range(3):
                assert notify.recv(4096).decode().startswith("WATCHDOG=1\nSTATUS=serving")
            running.process.signal(signal.SIGHUP)
            told(notify, "RELOADING=1")
            told(notify, "READY=1")
            running.process.signal(signal.SIGTERM)
            told(notify, "EXTEND_TIMEOUT_USEC=45000000")  # drain_s and a little more
            assert running.process.wait().status == 0


def test_lines_are_json_with_the_time_in_utc(site: Site, target: Running) -> None:
    target.process.signal(signal.SIGHUP)
    target.process.said("was read again")
    for line in stopped(target):
        assert {"time", "level", "logger", "message"} <= line.keys()
        assert line["time"].endswith("+00:00")
        assert json.dumps(line)
