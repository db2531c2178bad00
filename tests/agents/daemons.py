"""The two daemons as real processes, with the configurations that the tests give them."""

import asyncio
import json
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from replicator import certificates
from replicator.files import Files
from replicator.identity import Identities, Identity
from replicator.private_directory import PrivateDirectory
from replicator.transport import tls
from replicator.transport.dial import Address
from tests.agents.harness import BOUND_S, Process
from tests.replicator.web_client import Answer, WebClient

Toml = dict[str, Any]


def toml(found: Toml) -> str:
    """Keys of the top, then tables and lists of tables: JSON's texts, numbers and lists are TOML's, too."""
    top = {key: value for key, value in found.items() if not isinstance(value, dict)}
    lines = [f"{key} = {_inline(value)}" for key, value in top.items()]
    for name, table in found.items():
        if isinstance(table, dict):
            lines += [f"[{name}]", *(f"{key} = {_inline(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _inline(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_inline(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value)


class Running:
    """A daemon that listens."""

    def __init__(self, process: Process) -> None:
        self.process = process
        said = json.loads(process.line() or "{}")
        self.address = Address.parse(said["listen"]) if said else Address("127.0.0.1", 0)

    @property
    def heard(self) -> str:
        """What it has logged so far."""
        return self.process._errors.text

    def lines(self) -> list[dict[str, Any]]:
        """What it has logged, by the line; only once it has ended."""
        return [json.loads(line) for line in self.process.wait().stderr.splitlines()]


@contextmanager
def daemon(kind: str, config: Path, **how: Any) -> Iterator[Running]:
    """`replicator master-target` or `process-server` for the time of a block; `how` as for `Process`."""
    with Process(kind, "--config", config, "--json", **how) as process:
        yield Running(process)


class Site:
    """A master target's and a process server's folders and configurations."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.directory = path / "datastore"
        self.directory.mkdir()
        self.state = path / "state"
        self.token_file = path / "run" / "join-token"
        self.target_config = path / "master-target.toml"
        self.server_config = path / "process-server.toml"
        self.address = Address("127.0.0.1", 0)

    @contextmanager
    def target(self, *, more: Toml | None = None, **how: Any) -> Iterator[Running]:
        """The master target; where it was before, if it was."""
        top: Toml = {
            "directory": self.directory,
            "retention": self.path / "retention",
            "listen": str(self.address),
            "token_file": self.token_file,
            "log": {"format": "json"},
        }
        self.target_config.write_text(toml({**top, **(more or {})}))
        with daemon("master-target", self.target_config, **how) as running:
            self.address = running.address
            yield running

    def configure(self, groups: Sequence[Toml] | None, *, more: Toml | None = None) -> None:
        """Write the process server's configuration."""
        top: Toml = {
            "state": self.state,
            "listen": "127.0.0.1:0",
            "targets": [{"address": str(self.address), "token_file": self.token_file}],
            **({} if groups is None else {"groups": list(groups)}),
            "log": {"format": "json"},
        }
        self.server_config.write_text(toml({**top, **(more or {})}))

    @contextmanager
    def process_server(
        self, groups: Sequence[Toml] | None, *, more: Toml | None = None, **how: Any
    ) -> Iterator[Running]:
        self.configure(groups, more=more)
        with daemon("process-server", self.server_config, **how) as running:
            yield running

    def group(self, name: str, *sources: Path, interval_s: float = 1.0, **more: Any) -> Toml:
        disks = [{"name": source.stem, "source": source} for source in sources]
        return {"name": name, "target": str(self.address), "interval_s": interval_s, "disks": disks, **more}

    def identity(self) -> Identity:
        """The process server's, which has joined."""
        found = Identities(PrivateDirectory(Files(), self.state)).find_by_address(str(self.address))
        assert found is not None
        return found

    def get(self, running: Running, path: str, *, known: bool = True) -> Answer:
        """One request, with the process server's certificate or with none."""
        return asyncio.run(_get(running.address, self.identity(), path, known))

    def metrics(self, running: Running) -> dict[tuple[str, ...], float]:
        """All samples: name and values of labels -> value."""
        answer = self.get(running, "/metrics")
        assert answer.status == 200
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(answer.body.decode())
            for sample in family.samples
        }


def context(identity: Identity, *, known: bool) -> ssl.SSLContext:
    """For whoever has this identity, or only trusts its authority. Who answers is checked by `_get`: what a
    process server shows is no server's certificate.
    """
    authority = identity.authority
    made = tls.client_context(identity.credentials, authority) if known else tls.joining_context(authority)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    made.set_alpn_protocols([tls.ALPN_HTTP])
    return made


async def _get(address: Address, identity: Identity, path: str, known: bool) -> Answer:
    async with asyncio.timeout(BOUND_S):
        client = await WebClient.dial(address, context(identity, known=known), "")
        shown = client.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        authority = certificates.from_der(identity.authority)
        assert certificates.issued_by(certificates.from_der(shown), authority)
        try:
            return await client.get(path)
        finally:
            client.close()
