"""`replicator demo --azure`: from a page blob home and back to one, proved by independent programs."""

from pathlib import Path

import pytest

from tests.agents.harness import MIB, identical, run

AZURITE = pytest.mark.peer("azurite", "qemu-img", "mkfs.ext4", "debugfs")


@AZURITE
def test_a_disk_goes_home_and_back(tmp_path: Path) -> None:
    done = run("demo", "--azure", "--dir", tmp_path, "--json").ok
    assert done["verified"] and (done["way_back"], done["qemu_img"], done["kills"]) == (
        "identical",
        "identical",
        1,
    )
    assert identical(tmp_path / "demo-disk.img", Path(done["vmdk"]))
    first, last = done["steps"]
    assert (first["passes"], last["mode"]) == (2, "incremental")
    assert last["sent_bytes"] < 8 * MIB


def test_without_azurite_it_says_how_to_get_it(tmp_path: Path) -> None:
    path = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    done = run("demo", "--azure", "--dir", tmp_path, "--json", environment=path)
    assert done.error["code"] == "demo.no_azurite" and "make demo" in done.error["fix"]


def test_azure_and_a_source_are_refused(tmp_path: Path) -> None:
    done = run("demo", "--azure", "--source", tmp_path / "disk.img", "--json")
    assert done.status == 2 and done.error["code"] == "usage.demo"
