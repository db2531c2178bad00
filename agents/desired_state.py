"""The document that an agent converges on, kept durably in its state directory.

Not here: what is in it (``replicator/desired.py``) and how it comes.
"""

from __future__ import annotations

from replicator.desired import Desired, DesiredError, decode, encode
from replicator.errors import StateError
from replicator.failpoints import reach
from replicator.private_directory import PrivateDirectory

FILE = "desired.json"


def load(state: PrivateDirectory) -> Desired:
    """The kept document; one without groups where none was kept yet. Blocks.

    Raises:
        StateError: ``desired.damaged``, ``state.unusable``.
    """
    with state.held() as held:
        content = held.read(FILE)
        if content is None:
            return Desired(0)
        try:
            return decode(content)
        except DesiredError as error:
            raise StateError(
                "desired.damaged",
                f"{held.path / FILE} cannot be used: {error}",
                cause="it was edited or cut short, or comes from a newer release",
                fix="move it away: the control server sends it again",
            ) from None


def keep(state: PrivateDirectory, desired: Desired) -> None:
    """Keep a document; it is durable on return, and replaces the one before. Blocks.

    Raises:
        StateError, SpaceError: ``state.*``. DesiredError: it is none; nothing is changed then.
    """
    content = encode(desired)
    with state.held() as held:
        reach("desired.before_keep")
        held.replace(FILE, content)
        reach("desired.kept")
