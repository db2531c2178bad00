"""How to make each bad input of docs/errors.md, with the real commands and real file systems.

A scenario prepares, calls `case.watch` (or what calls it), and returns how the command ended. What must be
true afterwards is not here: `test_bad_input.py` checks it while the scenario's mounts are still there.
"""

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from protocol.errors import WireCode
from protocol.messages import Fail, Hello, Retry, Welcome
from protocol.state import Role
from replicator.certificates import ServerKind
from replicator.clock import Clock
from replicator.formats import vmdk
from tests.agents.fake_peer import Play, Talk, fake_target, joined
from tests.agents.harness import MIB, Done, Target, make_disk, receiving, run, send, sending, tree
from tests.agents.holding import relay
from tests.real_disks import loop_device
from tests.real_disks import run as system
from tests.replicator.trust import Installation

NO_RIGHTS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")  # root without what makes it root
NUL_ARGUMENT = """
import sys
from agents.cli.main import main
sys.argv = ["replicator", *(argument.replace("<NUL>", "\\0") for argument in sys.argv[1:])]
main()
"""  # execve cannot carry one


class Case:
    """One bad input: the shared target, a folder of its own, and what to look at afterwards."""

    def __init__(self, target: Target, state: Path, folder: Path, stack: ExitStack) -> None:
        self.target = target
        self.state = state
        self.folder = folder
        self.stack = stack
        self.disk = "disk"
        self.source = folder / "disk.img"
        self.watched = target.directory
        self.before: dict[str, tuple[int, int, str]] = {}

    def make_source(self, size: int = MIB) -> None:
        make_disk(self.source, size)

    def watch(self, directory: Path) -> None:
        """Remember what is in the directory, now that everything is prepared."""
        self.watched = directory
        self.before = tree(directory)

    def arguments(self, *options: str | Path) -> tuple[str | Path, ...]:
        return (self.source, "--to", self.target.address, "--state", self.state, "--json", *options)

    def send(self, *options: str, **how: Any) -> Done:
        """Send the source to the shared target, after making one where there is none."""
        if not self.source.exists():
            self.make_source()
        self.watch(self.target.directory)
        return run("send", *self.arguments(*options), **how)

    def receive(self, directory: Path, *options: str | Path, listen: str = "127.0.0.1:0") -> Done:
        self.watch(directory if directory.is_dir() else self.target.directory)
        return run("receive", "--directory", directory, "--listen", listen, "--json", *options)

    def file(self) -> Path:
        path = self.folder / "file"
        path.write_text("not a directory")
        return path

    def own_target(self, directory: Path, *options: str | Path) -> Target:
        """A target of the case's own."""
        return self.stack.enter_context(receiving(directory, *options))


SCENARIOS: dict[str, Callable[[Case], Done]] = {}


def scenario(key: str) -> Callable[[Callable[[Case], Done]], Callable[[Case], Done]]:
    def keep(function: Callable[[Case], Done]) -> Callable[[Case], Done]:
        assert key not in SCENARIOS, key
        SCENARIOS[key] = function
        return function

    return keep


def sent_with(key: str, *options: str, **how: Any) -> None:
    """A scenario that is nothing but an ordinary send with these options."""
    scenario(key)(lambda case: case.send(*options, **how))


# ------------------------------------------------------------------ sources


@scenario("source missing")
def _(case: Case) -> Done:
    case.watch(case.target.directory)
    case.source = case.folder / "nothing.img"
    return run("send", *case.arguments())


@scenario("source unreadable")
def _(case: Case) -> Done:
    case.make_source()
    case.source.chmod(0)
    return case.send(through=NO_RIGHTS)


@scenario("source empty")
def _(case: Case) -> Done:
    case.source.touch()
    return case.send()


@scenario("source not a multiple of 512")
def _(case: Case) -> Done:
    case.make_source(MIB + 499)
    return case.send()


@scenario("source is a directory")
def _(case: Case) -> Done:
    case.source.mkdir()
    return case.send()


@scenario("source is a character device")
def _(case: Case) -> Done:
    case.source = Path("/dev/null")
    return case.send("--disk", "null")


def resized(case: Case, size: int) -> Done:
    """The source gets another size while the send is held in the middle of its data."""
    case.make_source(16 * MIB)
    case.disk = f"resized-{size}"
    case.watch(case.target.directory)
    with (
        relay(case.target.port, hold_after=2 * MIB) as held,
        sending(
            case.source, held.address, case.state, "--disk", case.disk, token=case.target.token
        ) as process,
    ):
        held.wait_until_holding()
        with case.source.open("r+b") as file:
            file.truncate(size)
        held.release()
        return process.wait()


@scenario("source grows while it is read")
def _(case: Case) -> Done:
    return resized(case, 16 * MIB + 512)


@scenario("source shrinks while it is read")
def _(case: Case) -> Done:
    return resized(case, 8 * MIB)


@scenario("source with an I/O error")
def _(case: Case) -> Done:
    case.make_source(8 * MIB)
    device = case.stack.enter_context(loop_device(case.source))
    with case.source.open("r+b") as file:
        file.truncate(4 * MIB)  # the device keeps its size; what lies behind is an I/O error
    case.source = device
    case.disk = "failing"
    return case.send("--disk", case.disk)


# ------------------------------------------------------------------ target directories


@scenario("target directory missing")
def _(case: Case) -> Done:
    done = case.receive(case.folder / "nowhere")
    assert not (case.folder / "nowhere").exists()
    return done


@scenario("target directory is a file")
def _(case: Case) -> Done:
    return case.receive(case.file())


@contextmanager
def mounted_at(place: Path, *options: str | Path) -> Iterator[Path]:
    place.mkdir()
    system("mount", *options, place)
    try:
        yield place
    finally:
        system("umount", place)


@scenario("target read-only")
def _(case: Case) -> Done:
    place = case.stack.enter_context(mounted_at(case.folder / "ro", "-t", "tmpfs", "-o", "ro", "tmpfs"))
    return case.receive(place)


def small_target(case: Case, *options: str | Path, one_file_left: bool = False) -> Target:
    """A target on a file system of 16 MiB, which is watched."""
    image = case.folder / "small.img"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    system("mkfs.ext4", "-q", "-N", "64", image)  # room for 64 files and directories
    place = case.stack.enter_context(mounted_at(case.folder / "small", "-o", "loop", image))
    target = case.own_target(place, *options)
    if one_file_left:
        made = []
        with suppress(OSError):
            for number in range(1000):
                made.append(place / f"filler-{number}")
                made[-1].touch(exist_ok=False)
        assert len(made) < 1000
        made[0].unlink()
    case.watch(place)
    return target


def sent_to(case: Case, target: Target) -> Done:
    return send(case.source, target.address, case.folder / "state", token=target.token)


@scenario("target full")
def _(case: Case) -> Done:
    case.make_source(64 * MIB)
    # Apart from its retention, which would now and then be the one to fill up first.
    return sent_to(case, small_target(case, "--retention", case.folder / "retention"))


@scenario("target full, thick disk")
def _(case: Case) -> Done:
    case.make_source(64 * MIB)
    return sent_to(case, small_target(case, "--thick"))


@scenario("target full but for one file")
def _(case: Case) -> Done:
    case.make_source()
    return sent_to(case, small_target(case, "--retention", case.folder / "retention", one_file_left=True))


# ------------------------------------------------------------------ VMDKs that are there already


def existing(case: Case, size: int = MIB, *, change: tuple[bytes, bytes] = (b"", b"")) -> Path:
    """A target of the case's own with a VMDK `disk` in it, its descriptor changed; returns the directory."""
    directory = case.folder / "target"
    directory.mkdir()
    make_disk(directory / "disk-flat.vmdk", size)
    content = vmdk.render(vmdk.new("disk-flat.vmdk", size, cid=7))
    assert change[0] in content
    (directory / "disk.vmdk").write_bytes(content.replace(*change) if change[0] else content)
    return directory


def sent_over(case: Case, directory: Path) -> Done:
    case.make_source()
    target = case.own_target(directory)
    case.watch(directory)
    return sent_to(case, target)


@scenario("descriptor names a path outside its folder")
def _(case: Case) -> Done:
    directory = existing(case, change=(b'"disk-flat.vmdk"', b'"../secret-flat.vmdk"'))
    secret = make_disk(case.folder / "secret-flat.vmdk", MIB)
    before = secret.read_bytes()
    done = sent_over(case, directory)
    assert secret.read_bytes() == before
    return done


@scenario("descriptor with a wrong extent size")
def _(case: Case) -> Done:
    directory = existing(case)
    with (directory / "disk-flat.vmdk").open("r+b") as file:
        file.truncate(MIB // 2)
    return sent_over(case, directory)


@scenario("descriptor of a sparse type")
def _(case: Case) -> Done:
    directory = case.folder / "target"
    directory.mkdir()
    system("qemu-img", "create", "-q", "-f", "vmdk", directory / "disk.vmdk", str(MIB))
    return sent_over(case, directory)


@scenario("descriptor of a snapshot's delta")
def _(case: Case) -> Done:
    directory = existing(case)
    descriptor = directory / "disk.vmdk"
    content = descriptor.read_bytes().replace(b"parentCID=ffffffff", b"parentCID=7b1c22a5")
    content = content.replace(
        b'createType="vmfs"', b'createType="vmfsSparse"\nparentFileNameHint="base.vmdk"'
    )
    descriptor.write_bytes(content.replace(b'VMFS "disk-flat.vmdk"', b'VMFSSPARSE "disk-000001-delta.vmdk"'))
    return sent_over(case, directory)


@scenario("descriptor that is no text")
def _(case: Case) -> Done:
    directory = existing(case)
    (directory / "disk.vmdk").write_bytes(bytes(MIB // 1024))
    return sent_over(case, directory)


@scenario("descriptor without its data file")
def _(case: Case) -> Done:
    directory = existing(case)
    (directory / "disk-flat.vmdk").unlink()
    return sent_over(case, directory)


@scenario("symbolic link in place of the data file")
def _(case: Case) -> Done:
    directory = existing(case)
    secret = (directory / "disk-flat.vmdk").rename(case.folder / "secret")
    (directory / "disk-flat.vmdk").symlink_to(secret)
    before = secret.read_bytes()
    done = sent_over(case, directory)
    assert secret.read_bytes() == before
    return done


@scenario("existing VMDK larger than the source")
def _(case: Case) -> Done:
    return sent_over(case, existing(case, 2 * MIB))


@scenario("existing VMDK smaller than the source")
def _(case: Case) -> Done:
    return sent_over(case, existing(case, MIB // 2))


# ------------------------------------------------------------------ names


sent_with("disk name with /", "--disk", "a/b")
sent_with("disk name ..", "--disk", "..")
sent_with("disk name with NUL", "--disk", "a<NUL>b", command=(sys.executable, "-c", NUL_ARGUMENT))
sent_with("disk name of 300 characters", "--disk", "x" * 300)
sent_with("disk name that is no UTF-8", "--disk", b"\xff".decode(errors="surrogateescape"))
sent_with("disk name empty", "--disk", "")


@scenario("disk of another process server")
def _(case: Case) -> Done:
    case.make_source()
    case.watch(case.target.directory)
    token = Installation(case.target.retention, Clock()).tokens.create(ServerKind.PROCESS_SERVER)
    return send(
        case.source,
        case.target.address,
        case.folder / "another",
        "--disk",
        "kept",
        token=token.to_text(),
    )


# ------------------------------------------------------------------ master targets that cannot start


def empty_target(case: Case) -> Path:
    directory = case.folder / "target"
    directory.mkdir()
    return directory


@scenario("port taken")
def _(case: Case) -> Done:
    return case.receive(empty_target(case), listen=case.target.address)


@scenario("listening address of another machine")
def _(case: Case) -> Done:
    return case.receive(empty_target(case), listen="192.0.2.1:0")


@scenario("listening address that does not resolve")
def _(case: Case) -> Done:
    return case.receive(empty_target(case), listen="x" * 70)  # too long for DNS: no server is asked


@scenario("second master target on the same directory")
def _(case: Case) -> Done:
    return case.receive(case.target.directory)


@scenario("retention directory that is a file")
def _(case: Case) -> Done:
    return case.receive(empty_target(case), "--retention", case.file())


@scenario("damaged authority")
def _(case: Case) -> Done:
    retention = case.folder / "target" / ".replicator"
    retention.mkdir(parents=True)
    (retention / "authority.json").write_text("{")
    return case.receive(case.folder / "target")


@scenario("damaged catalogue")
def _(case: Case) -> Done:
    directory = existing(case)
    (directory / ".replicator").mkdir()
    (directory / ".replicator" / "catalogue.json").write_text("{")
    return sent_over(case, directory)


# ------------------------------------------------------------------ addresses and peers


sent_with("wrong address syntax", "--to", "127.0.0.1:99999")


def sent_elsewhere(case: Case, address: str) -> Done:
    """An ordinary send with a good token, but to another address."""
    case.make_source()
    case.watch(case.target.directory)
    return send(case.source, address, case.folder / "state", token=case.target.token)


@scenario("host name that does not resolve")
def _(case: Case) -> Done:
    return sent_elsewhere(case, "x" * 70)  # too long for DNS: no server is asked


@scenario("nobody listens")
def _(case: Case) -> Done:
    with socket.socket() as bound:  # the port is ours, but there is no listen()
        bound.bind(("127.0.0.1", 0))
        return sent_elsewhere(case, f"127.0.0.1:{bound.getsockname()[1]}")


@scenario("another service listens")
def _(case: Case) -> Done:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def greet() -> None:
            sock, _ = listening.accept()
            with sock:
                sock.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        done = sent_elsewhere(case, f"127.0.0.1:{listening.getsockname()[1]}")
        thread.join(5)
        return done


def sent_to_fake(case: Case, play: Play) -> Done:
    installation = Installation(case.folder / "installation", Clock())
    address = case.stack.enter_context(fake_target(installation, play))
    joined(installation, address, case.folder / "state")
    case.make_source()
    case.watch(case.target.directory)
    return send(case.source, address, case.folder / "state")


@scenario("peer of another version")
def _(case: Case) -> Done:
    def refuse(sock: Any) -> None:
        talk = Talk(sock, Role.RECEIVER)
        heard = talk.hear()
        assert isinstance(heard, Hello)
        ours, theirs = (2, 3), (heard.version_min, heard.version_max)
        reason = "the peer speaks versions {} to {}, this side {} to {}".format(*theirs, *ours)
        talk.connection.send(Fail(WireCode.VERSION, Retry.STOP, reason))
        talk.flush()

    return sent_to_fake(case, refuse)


@scenario("peer that picks another version")
def _(case: Case) -> Done:
    def pick(sock: Any) -> None:
        talk = Talk(sock, Role.RECEIVER)
        talk.hear()
        talk.connection.send(Welcome(2, 0, 0, 4, "of the future"))
        talk.flush()
        with suppress(OSError):
            sock.recv(1)

    return sent_to_fake(case, pick)


# ------------------------------------------------------------------ options, tokens, identities


sent_with("bad compression value", "--compression", "20")
sent_with("too many streams", "--streams", "17")
sent_with("unknown option", "--bogus")
sent_with("malformed token", "--token", "rpl1." + "A" * 79)


def sent_with_another(case: Case, *options: str) -> Done:
    """Two sources, `disk.img` and another of its kind in another folder."""
    case.make_source()
    (case.folder / "more").mkdir()
    other = make_disk(case.folder / "more" / "disk.img", MIB)
    return case.send(str(other), *options)


@scenario("several sources and no group")
def _(case: Case) -> Done:
    return sent_with_another(case, "--disk", "a", "--disk", "b")


@scenario("group name that is none")
def _(case: Case) -> Done:
    return case.send("--group", "a\tb")


@scenario("more sources than names")
def _(case: Case) -> Done:
    return sent_with_another(case, "--group", "web", "--disk", "a")


@scenario("two disks of one name")
def _(case: Case) -> Done:
    return sent_with_another(case, "--group", "web")


@scenario("one source twice")
def _(case: Case) -> Done:
    case.make_source()
    (case.folder / "again.img").symlink_to("disk.img")
    return case.send(str(case.folder / "again.img"), "--group", "web")


def sent_with_list(case: Case, content: str | None, size: int = 0) -> Done:
    path = case.folder / ("nothing.json" if content is None else "list.json")
    if content is not None:
        path.write_text(content)
        if size:
            with path.open("r+b") as file:
                file.truncate(size)
    return case.send("--changed-extents", str(path))


def list_of(disks: object) -> str:
    return json.dumps({"since": "5" * 32, "disks": disks})


@scenario("list of changed extents missing")
def _(case: Case) -> Done:
    return sent_with_list(case, None)


@scenario("list of changed extents of 65 MiB")
def _(case: Case) -> Done:
    return sent_with_list(case, "", 65 * MIB)


@scenario("list of changed extents cut short")
def _(case: Case) -> Done:
    return sent_with_list(case, list_of({"disk": [[0, 512]]})[:-1])


@scenario("list of changed extents with numbers as text")
def _(case: Case) -> Done:
    return sent_with_list(case, list_of({"disk": [["0", 512]]}))


@scenario("list of changed extents of another disk")
def _(case: Case) -> Done:
    return sent_with_list(case, list_of({"disk": [], "other": []}))


@scenario("list of changed extents without the disk")
def _(case: Case) -> Done:
    return sent_with_list(case, list_of({}))


@scenario("changed extent behind the disk's end")
def _(case: Case) -> Done:
    return sent_with_list(case, list_of({"disk": [[MIB, 512]]}))


@scenario("changed extent that is not in sectors")
def _(case: Case) -> Done:
    return sent_with_list(case, list_of({"disk": [[8, 1]]}))


@scenario("no source given")
def _(case: Case) -> Done:
    case.watch(case.target.directory)
    return run("send", "--json", "--to", case.target.address)


@scenario("both token options")
def _(case: Case) -> Done:
    return case.send("--token", case.target.token, "--token-file", str(case.file()))


@scenario("token file missing")
def _(case: Case) -> Done:
    return case.send("--token-file", str(case.folder / "nothing.txt"))


@scenario("no identity")
def _(case: Case) -> Done:
    case.state = case.folder / "state"
    return case.send()


@scenario("damaged identity")
def _(case: Case) -> Done:
    case.make_source()
    state = case.folder / "state"
    token = Installation(case.target.retention, Clock()).tokens.create(ServerKind.PROCESS_SERVER)
    assert send(case.source, case.target.address, state, "--disk", "damaged", token=token.to_text()).ok
    (pem,) = state.glob("identities/*/identity.pem")
    pem.write_bytes(pem.read_bytes()[:-100])
    case.state = state
    return case.send("--disk", "damaged")


@scenario("state directory that is a file")
def _(case: Case) -> Done:
    case.state = case.file()
    return case.send()


@scenario("demo into a file")
def _(case: Case) -> Done:
    case.make_source()
    case.watch(case.target.directory)
    return run("demo", "--source", case.source, "--dir", case.file(), "--json")
