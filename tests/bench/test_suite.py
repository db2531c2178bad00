"""The benchmark from end to end, on a small disk: every contender that is installed, its data verified."""

import json
import shutil

import pytest

from bench import report, suite
from bench.errors import BenchError
from bench.options import MIB, Options
from bench.plot import ready
from bench.processes import RunFailed
from tests.agents.harness import run

PEERS = {
    "nbdcopy": ("nbdkit", "nbdcopy"), "qemu-img": ("qemu-img", "qemu-nbd"), "zstd": ("zstd", "socat"),
    "rsync, TLS": ("rsync", "stunnel"), "rsync": ("rsync",), "Replicator": (),
}  # fmt: skip


def needed(name: str) -> tuple[str, ...]:
    return next(programs for start, programs in PEERS.items() if name.startswith(start))


@pytest.mark.peer("mkfs.ext4", "unshare", "nsenter", "ip")
def test_every_contender_that_is_installed_brings_the_disk_over() -> None:
    said: list[str] = []
    options = Options(size_bytes=32 * MIB, rounds=1, parts=("full", "resync"), quick=True)
    document = json.loads(json.dumps(suite.run(options, said.append)))
    assert [scenario["key"] for scenario in document["scenarios"]] == ["full", "resync-1%"]
    assert report.failures(document) == []
    for scenario in document["scenarios"]:
        assert scenario["size_bytes"] == 32 * MIB > scenario["data_bytes"] > 0
        for each in scenario["standings"]:
            absent = [program for program in needed(each["name"]) if shutil.which(program) is None]
            if absent:
                assert each["problem"] == f"not installed: {', '.join(absent)}"
                continue
            assert each["problem"] is None, each
            assert len(each["runs"]) == 1 and each["seconds"] > 0 and each["mb_s"] > 0
            assert each["wire_bytes"] > 0 and each["cpu_s_per_gb"] > 0
            assert min(each["peak_bytes"].values()) >= 0 and max(each["peak_bytes"].values()) > MIB
    resync = {each["name"]: each for each in document["scenarios"][1]["standings"]}
    full = {each["name"]: each for each in document["scenarios"][0]["standings"]}
    assert resync[suite.KNOWING]["wire_bytes"] < full[suite.RAW]["wire_bytes"] / 10
    assert document["stages"] is None and document["micro"] is None
    assert {"cpu", "kernel", "file_system", "versions"} <= document["machine"].keys()
    _can_be_shown(document)


def _can_be_shown(document: dict[str, object]) -> None:
    page = report.markdown(document)
    for scenario in document["scenarios"]:  # type: ignore[attr-defined]
        assert all(f"| {each['name']} |" in page for each in scenario["standings"])


@pytest.mark.peer("mkfs.ext4", "unshare", "nsenter", "ip")
def test_a_line_is_measured_with_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.options.QUICK_LINES", [(1000, 20)])
    options = Options(size_bytes=32 * MIB, parts=("line",), quick=True)
    document = suite.run(options, lambda line: None)
    assert report.failures(document) == []
    (scenario,) = document["scenarios"]
    assert scenario["key"] == "line-1000-20"
    good = [each for each in scenario["standings"] if each["problem"] is None]
    assert good[0]["name"] == suite.AUTO
    assert all(0 < each["line_use"] <= 1 for each in good)


def test_without_namespaces_lines_are_left_out_and_the_rest_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "_can_make_namespaces", lambda: False)
    options = Options(size_bytes=32 * MIB, parts=("line",), quick=True)
    document = suite.run(options, lambda line: None)
    assert document["remarks"][0].startswith("no network namespaces")
    problems = {each["problem"] for one in document["scenarios"] for each in one["standings"]}
    assert problems == {suite.NO_NAMESPACE}
    assert report.failures(document) == [] and report.missing(document)


def test_a_size_that_is_none_is_wrong_usage() -> None:
    assert run("bench", "--size", "huge", "--json").error["code"] == "usage.size"


def test_what_cannot_be_run_is_said_with_cause_and_fix() -> None:
    told = run("bench", "--size", "1M", "--json").error
    assert told["code"] == "bench.failed" and "too small" in told["message"]


def test_plots_are_not_asked_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.plot.find_spec", lambda name: None)
    with pytest.raises(BenchError, match=r"requirements/bench\.txt"):
        ready()


def test_a_scenario_that_fails_costs_no_other_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object) -> None:
        raise RunFailed("no luck")

    monkeypatch.setattr(suite.Suite, "_full", broken)
    monkeypatch.setattr(suite, "_can_make_namespaces", lambda: False)
    monkeypatch.setattr("bench.options.QUICK_LINES", [(1000, 20)])
    options = Options(size_bytes=32 * MIB, parts=("full", "line"), quick=True)
    document = suite.run(options, lambda line: None)
    assert [scenario["kind"] for scenario in document["scenarios"]] == ["line"]
    assert report.failures(document) == ["nothing came of scenario 1: no luck"]
    assert "no luck" in report.heading(document)


def test_our_share_is_of_what_the_stages_allow() -> None:
    allowed = {"ideals": [{"level": 0, "mb_s": 1000.0}, {"level": 1, "mb_s": 2000.0}]}
    names = (suite.AUTO, suite.RAW, "a peer")
    standings = [{"name": name, "mb_s": 500.0, "problem": None} for name in names]
    scenario = {"kind": "full", "standings": standings}
    assert suite._shares(allowed, [scenario]) == {suite.AUTO: 0.25, suite.RAW: 0.5}
