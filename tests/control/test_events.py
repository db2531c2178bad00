"""The stream of events: nothing missed, nothing twice, nobody listens on who may not."""

import asyncio
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from replicator.control.feed import STREAMS_MAX
from replicator.control.models import Role, Severity
from replicator.control.repositories import events
from replicator.control.repositories.events import Happening
from tests.control.conftest import Api

Check = Callable[..., Any]
STREAM = "/api/v1/events/stream"


async def tell(api: Api, number: int) -> None:
    async with api.database.write() as connection:
        happening = Happening(Severity.INFO, "test.event", f"thing-{number}", "it happened\nand again")
        await events.append(connection, happening, api.parts.clock.now_ns())
    api.parts.feed.wake()


def listening(api: Api, **headers: str) -> Any:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return api.client.get(STREAM, headers={"Authorization": f"Bearer {api.tokens[Role.VIEWER]}", **sent})


async def heard(response: Any, count: int) -> list[tuple[int, str]]:
    """(id, thing) of the next events; comments are passed over."""
    found: list[tuple[int, str]] = []
    while len(found) < count:
        message = (await response.content.readuntil(b"\n\n")).decode()
        if message.startswith(":"):
            continue
        fields = dict(line.split(": ", 1) for line in message.strip().split("\n"))
        found.append((int(fields["id"]), json.loads(fields["data"])["thing"]))
    return found


async def test_events_come_as_they_happen_and_from_where_a_client_was(api: Api) -> None:
    await tell(api, 1)
    async with listening(api) as response:
        assert response.content_type == "text/event-stream"
        await response.content.readuntil(b"\n\n")  # nothing new: it looks from now on
        await tell(api, 2)
        await tell(api, 3)
        assert await heard(response, 2) == [(2, "thing-2"), (3, "thing-3")]
    async with listening(api, Last_Event_ID="1") as response:
        assert await heard(response, 2) == [(2, "thing-2"), (3, "thing-3")]


async def test_a_client_that_comes_back_gets_more_than_one_look_holds(api: Api) -> None:
    for number in range(250):
        async with api.database.write() as connection:
            happening = Happening(Severity.INFO, "test.event", f"thing-{number}", "")
            await events.append(connection, happening, 0)
    async with listening(api, Last_Event_ID="0") as response:
        assert [number for number, _ in await heard(response, 250)] == list(range(1, 251))


async def test_numbers_are_in_the_order_of_becoming_visible(api: Api) -> None:
    """With a plain sequence, a reader between the two commits would see 2, and never 1."""
    first_told, second_may_end = asyncio.Event(), asyncio.Event()

    async def slow() -> int:
        async with api.database.write() as connection:
            seq = await events.append(connection, Happening(Severity.INFO, "a.b", "slow", ""), 0)
            first_told.set()
            await second_may_end.wait()
        return seq

    async def quick() -> int:
        async with api.database.write() as connection:
            return await events.append(connection, Happening(Severity.INFO, "a.b", "quick", ""), 0)

    slowly = asyncio.create_task(slow())
    await first_told.wait()
    quickly = asyncio.create_task(quick())
    done, _ = await asyncio.wait([quickly], timeout=0.3)
    assert not done
    second_may_end.set()
    assert (await slowly, await quickly) == (1, 2)


async def test_who_is_revoked_stops_hearing_within_5_s(api: Api) -> None:
    async with listening(api) as response:
        await response.content.readuntil(b"\n\n")
        revoked = await api.ask("POST", f"/api/v1/operators/{api.ids[Role.VIEWER]}/revoke", If_Match="*")
        assert revoked.status == 200
        async with asyncio.timeout(5):
            rest = await response.content.read()
        assert b"data:" not in rest


async def test_streams_are_limited_and_the_rest_goes_on(api: Api, problem: Check) -> None:
    api.parts.feed.listeners.update(range(STREAMS_MAX))
    await problem(await api.ask("GET", STREAM), 429, "api.too_many_streams")
    assert (await api.ask("GET", "/api/v1/events")).status == 200


async def test_a_wrong_place_to_go_on_from_is_refused(api: Api, problem: Check) -> None:
    for wrong in ("x", "-1", "9" * 30, "\u00b2"):
        response = await api.ask("GET", STREAM, Last_Event_ID=wrong)
        await problem(response, 400, "api.malformed")


async def test_the_server_stops_though_somebody_listens(api: Api) -> None:
    async with listening(api) as response:
        await response.content.readuntil(b"\n\n")
        async with asyncio.timeout(5):
            await api.client.close()


async def test_old_events_are_forgotten(api: Api) -> None:
    day_ns = timedelta(days=1) // timedelta(microseconds=1) * 1000
    async with api.database.write() as connection:
        for number in range(4):
            happening = Happening(Severity.INFO, "a.b", str(number), "")
            await events.append(connection, happening, number * day_ns)
        assert await events.prune(connection, 2 * day_ns) == 2
    page = await (await api.ask("GET", "/api/v1/events")).json()
    assert [item["thing"] for item in page["items"]] == ["2", "3"]
