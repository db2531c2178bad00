"""The product's source files, parsed, for the house tests."""

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("protocol", "replicator", "agents")


@dataclass(frozen=True, slots=True)
class Module:
    """One source file. `name` is dotted; a package's is that of its folder."""

    name: str
    source: str
    is_package: bool = False

    @property
    def tree(self) -> ast.Module:
        return _parse(self.source, self.name)


@functools.cache
def _parse(source: str, name: str) -> ast.Module:
    return ast.parse(source, filename=name)


@functools.cache
def modules(*folders: str) -> tuple[Module, ...]:
    """Every module below these top-level folders, sorted by name."""
    found = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            found.append(Module(name, path.read_text(encoding="utf-8"), is_package))
    return tuple(found)
