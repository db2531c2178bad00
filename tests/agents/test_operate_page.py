"""docs/operate.md lists what there is: every key of the configurations and every metric, and no other."""

import ast
import re

import pytest

from tests.agents.daemons import Site
from tests.agents.harness import make_disk
from tests.house.tree import ROOT, modules

PAGE = (ROOT / "docs" / "operate.md").read_text()
TAKES = {"take", "number", "choice", "path", "address", "table", "tables"}


def section(title: str) -> str:
    """What stands under a heading, up to the next."""
    return re.split(r"^#+ ", PAGE.split(f"{title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def listed(text: str) -> set[str]:
    """What stands first in the rows of its tables."""
    return set(re.findall(r"^\| `([a-z_\[\].]+)", text, re.MULTILINE))


def test_every_key_is_listed() -> None:
    (config,) = (module for module in modules("agents") if module.name == "agents.config")
    taken = {
        argument.value
        for node in ast.walk(config.tree)
        if isinstance(node, ast.Call)
        for argument in node.args
        if isinstance(argument, ast.Constant) and _takes(node.func)
        if isinstance(argument.value, str) and re.fullmatch("[a-z_]+", argument.value)
    }
    keys = {part.removesuffix("[]") for key in listed(section("## Every key")) for part in key.split(".")}
    assert keys == taken - {"auto", "text", "info"}


def _takes(function: ast.expr) -> bool:
    if isinstance(function, ast.Attribute):
        return function.attr in TAKES
    return isinstance(function, ast.Name) and function.id == "_secret"


@pytest.mark.parametrize("daemon", ["process server", "master target"])
def test_every_metric_is_listed(site: Site, daemon: str) -> None:
    source = make_disk(site.path / "disk.img", 1 << 20)
    with site.target() as target, site.process_server([site.group("web", source, interval_s=60)]) as server:
        server.process.said("is sealed")
        found = {name[0] for name in site.metrics(server if daemon == "process server" else target)}
    ours = {name for name in found if name.startswith("replicator_")}
    names = listed(section("### Metrics of both")) | listed(section(f"### Metrics of a {daemon}"))
    not_yet = {"replicator_group_lag_seconds"} if daemon == "master target" else set()
    assert ours | not_yet == names - {"process_"}


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))
