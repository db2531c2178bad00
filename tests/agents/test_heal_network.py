"""A line between two network namespaces of which one direction drops everything without a word."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agents.harness import BOUND_S, MIB, identical, make_disk, receiving, sending
from tests.real_disks import run as system

pytestmark = pytest.mark.peer("qemu-img", "ip", "nft")

HERE, THERE = "192.0.2.1", "192.0.2.2"  # a net for documentation: nobody else has it
DATA = ("32", "mbytes")
ANSWERS = ("64", "kbytes")  # with the kernel's acknowledgements of some 64 MiB
SILENCE_S = 15.0
START_S = 8.0  # until so many bytes have passed, and the other side has told its end


class Namespaces:
    """Two hosts and the line between them. `target` and `sender`: their names."""

    def __init__(self) -> None:
        self.target, self.sender = (f"replicator-{side}-{os.getpid()}" for side in "ts")

    def make(self) -> None:
        for name in (self.target, self.sender):
            system("ip", "netns", "add", name)
            self.inside(name, "ip", "link", "set", "lo", "up")
        peer = ("type", "veth", "peer", "name", "line", "netns", self.sender)
        system("ip", "link", "add", "line", "netns", self.target, *peer)
        for name, address in ((self.target, HERE), (self.sender, THERE)):
            self.inside(name, "ip", "address", "add", f"{address}/24", "dev", "line")
            self.inside(name, "ip", "link", "set", "line", "up")

    def inside(self, name: str, *command: str) -> str:
        return system(*self.through(name), *command)

    def through(self, name: str) -> tuple[str, ...]:
        return ("ip", "netns", "exec", name)

    def drop_what_comes(self, name: str, *matching: str, after: tuple[str, str]) -> None:
        """From so many bytes on, what arrives there is dropped."""
        self.inside(name, "nft", "add", "table", "inet", "line")
        hook = "{ type filter hook input priority 0; }"
        self.inside(name, "nft", "add", "chain", "inet", "line", "input", hook)
        rule = (*matching, "quota", "over", *after, "drop")
        self.inside(name, "nft", "add", "rule", "inet", "line", "input", *rule)

    def heal(self) -> None:
        for name in (self.target, self.sender):
            self.inside(name, "nft", "flush", "ruleset")


@pytest.fixture
def hosts() -> Iterator[Namespaces]:
    made = Namespaces()
    try:
        made.make()
        yield made
    finally:
        for name in (made.target, made.sender):
            system("ip", "netns", "delete", name)


def lose(hosts: Namespaces, dropping: str, port: int) -> None:
    if dropping == "data":
        hosts.drop_what_comes(hosts.target, "tcp", "dport", str(port), after=DATA)
    else:
        hosts.drop_what_comes(hosts.sender, "tcp", "sport", str(port), after=ANSWERS)


@pytest.mark.parametrize("dropping", ["data", "answers"])
def test_one_way_loss_is_noticed_and_told_and_over_when_the_line_heals(
    dropping: str, hosts: Namespaces, tmp_path: Path
) -> None:
    source = make_disk(tmp_path / "disk.img", 256 * MIB)
    through = hosts.through(hosts.target)
    with receiving(tmp_path / "target", listen=f"{HERE}:0", through=through) as target:
        began = time.monotonic()
        lose(hosts, dropping, target.port)
        with sending(
            source,
            target.address,
            tmp_path / "state",
            "--compression",
            "off",
            token=target.token,
            give_up_after_s=None,
            through=hosts.through(hosts.sender),
        ) as process:
            process.said("trying again in", within_s=SILENCE_S + START_S)
            noticed = time.monotonic()
            hosts.heal()
            done = process.wait()
        ended = time.monotonic()
        assert done.ok["fuzzy"] is False
        assert identical(source, target.directory / "disk.vmdk")
    print(f"noticed {noticed - began:.1f} s after the start, done {ended - noticed:.1f} s after healing")
    assert ended - noticed <= 30.0 < BOUND_S
