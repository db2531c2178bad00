"""What the benchmark needs comes pinned, and every peer by a package that is named."""

from bench import contenders
from tests.house.test_requirements import REQUIREMENTS, pins, problems


def test_each_pin_has_its_hashes() -> None:
    assert problems((REQUIREMENTS / "bench.txt").read_text()) == []
    assert "matplotlib" in pins(REQUIREMENTS / "bench.txt")


def test_what_both_install_has_one_version() -> None:
    dev, bench = pins(REQUIREMENTS / "dev.txt"), pins(REQUIREMENTS / "bench.txt")
    assert {name: dev[name] for name in bench.keys() & dev.keys()} == {
        name: bench[name] for name in bench.keys() & dev.keys()
    }


def test_setting_up_does_not_install_it() -> None:
    assert "matplotlib" not in pins(REQUIREMENTS / "dev.txt")


def test_every_program_of_a_contender_has_its_package() -> None:
    lines = (REQUIREMENTS / "bench-peers.txt").read_text().splitlines()
    provided = {line.split()[1] for line in lines if line and not line.startswith("#")}
    peers = (
        contenders.nbdcopy(), contenders.qemu_img(), contenders.zstd_pipe(),
        contenders.rsync("rsync", tls=True),
    )  # fmt: skip
    assert {program for peer in peers for program in peer.programs} <= provided
