"""``replicator recovery-points``: what the groups of a master target can go back to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agents.cli.output import document


def recovery_points(
    directory: Annotated[Path, typer.Option(readable=False, help="Where the master target's VMDKs are.")],
    retention: Annotated[
        Path | None,
        typer.Option(readable=False, help="Where its own things lie. Default: DIRECTORY/.replicator"),
    ] = None,
    group: Annotated[str | None, typer.Option(help="Only those of this group.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List recovery points, oldest first. The master target may be running."""
    from replicator.errors import TargetError
    from replicator.files import Files
    from replicator.images.catalogue import load
    from replicator.log import points
    from replicator.log.place import GroupDirectory
    from replicator.private_directory import PrivateDirectory

    own = retention or directory / ".replicator"
    if not own.is_dir():
        raise TargetError(
            "target.missing",
            f"{own} does not exist",
            cause="no master target has received anything into this directory yet, or --retention differs",
            fix="name the directories that `replicator receive` was started with",
        )
    place = PrivateDirectory(Files(), own)
    names = [name for name in sorted(GroupDirectory.names(place)) if group in (None, name)]
    with place.held() as held:
        catalogue = load(held)
    found = [
        {"group": name, **point}
        for name in names
        for point in points.describe(GroupDirectory(place, name).load())
        # Recorded, but the target died before it was sealed: dropped, or sealed, by the next OPEN.
        if point["id"] != catalogue.epochs_of(name).under_way.hex()
    ]
    if as_json:
        document({"recovery_points": found})
        return
    for point in found:
        typer.echo(
            f"{point['time']}  {point['consistency']:11}  {point['group']}  {point['id']}  "
            f"{', '.join(point['disks'])}"
        )
    if not found:
        typer.echo("no recovery points", err=True)
