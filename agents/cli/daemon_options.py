"""What the commands that start daemons have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agents.cli.output import document, say

ConfigFile = Annotated[Path, typer.Option(readable=False, help="The configuration, a TOML file.")]
CheckConfig = Annotated[
    bool, typer.Option("--check-config", help="Look at the configuration and do nothing else.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document as soon as it listens.")]


def tell_valid(config: Path, as_json: bool) -> None:
    """The configuration is as it should be."""
    if as_json:
        document({"config": str(config), "valid": True})
    else:
        say(f"{config} is valid")
