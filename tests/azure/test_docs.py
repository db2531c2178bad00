"""docs/azure.md: the custom role grants what the product asks for, the limits are those of the code."""

import json
import re

from replicator.azure import limits
from tests.azure.fake_arm import COMPUTE, routes
from tests.house.tree import ROOT

PAGE = (ROOT / "docs" / "azure.md").read_text(encoding="utf-8")

# What Azure wants beside what is asked of it: the source of a snapshot, and looks at operations under way.
IMPLIED = {
    "Microsoft.Compute/disks/beginGetAccess/action",
    "Microsoft.Compute/locations/operations/read",
    "Microsoft.Compute/locations/diskOperations/read",
}


def action(method: str, path: str) -> str:
    """What ARM calls the right to a request: the path's types, and the verb."""
    parts = [part for part in path.strip("/").split("/") if not part.startswith("{")]
    verb = {"GET": "read", "PUT": "write", "DELETE": "delete", "POST": "action"}[method]
    return "/".join(["Microsoft.Compute", *parts, verb])


def test_the_role_grants_what_the_product_asks_for_and_no_more() -> None:
    (text,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    granted = set(json.loads(text)["Actions"])
    asked = {action(method, path.removeprefix(COMPUTE)) for method, path in routes()}
    assert "Microsoft.Compute/snapshots/beginGetAccess/action" in asked
    assert granted == asked | IMPLIED


def test_the_page_tells_the_limits_of_the_code() -> None:
    for known in (limits.PREMIUM_BLOB, limits.INCREMENTAL):
        row = f"| {known.name} | {known.count} in {known.window_s // 60} minutes, {known.held} in all |"
        assert row in PAGE
    assert f"open for reading | {limits.SAS_PER_FAMILY}; a cycle needs 2 |" in PAGE
    assert f"{limits.DIFF_BOUNDARY_BYTES // limits.TIB} TiB" in PAGE
    assert "| 1 an hour |" in PAGE and limits.CRASH_POINT.window_s == 3600
    assert "| 1 in 3 hours |" in PAGE and limits.APPLICATION_POINT.window_s == 3 * 3600
