"""The API as its clients meet it: what is made, shown, changed and deleted; revisions, repetitions, pages."""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from replicator.control.models import Role
from replicator.control.repositories import points, servers
from replicator.control.repositories.points import Announced
from replicator.tokens import parse_token
from tests.control.conftest import Api
from tests.replicator.trust import SetClock

Check = Callable[..., Any]
V1 = "/api/v1"
NAMED: dict[str, dict[str, Any]] = {
    "policies": {"name": "hourly", "interval_s": 3600},
    "connections": {"name": "site", "kind": "vcenter", "address": "vc.example:443", "secret": "vc-password"},
    "groups": {"name": "web"},
    "machines": {"name": "web-1", "disks": [{"name": "root", "source": "/dev/sda", "size_bytes": 1 << 30}]},
}
PROCESS_SERVER, MASTER_TARGET = "ps-" + "a" * 32, "mt-" + "b" * 32


async def add_servers(api: Api) -> None:
    async with api.database.write() as connection:
        for server in (PROCESS_SERVER, MASTER_TARGET):
            await servers.joined(connection, server, api.parts.clock.now_ns())


@pytest.mark.parametrize("path", NAMED)
async def test_a_thing_is_made_shown_changed_and_deleted(api: Api, problem: Check, path: str) -> None:
    response = await api.ask("POST", f"{V1}/{path}", json=NAMED[path])
    made = await response.json()
    assert (response.status, response.headers["ETag"]) == (201, '"1"')
    where = response.headers["Location"]
    assert where == f"{V1}/{path}/{made['id']}"
    assert NAMED[path].items() <= made.items()

    shown = await api.ask("GET", where, Role.VIEWER)
    assert (await shown.json(), shown.headers["ETag"]) == (made, '"1"')
    assert (await api.ask("GET", where, If_None_Match='"1"')).status == 304

    change = {**NAMED[path], "name": "renamed"}
    await problem(await api.ask("PUT", where, json=change), 428, "api.if_match_missing")
    await problem(await api.ask("PUT", where, json=change, If_Match='"9"'), 412, "api.changed")
    changed = await api.ask("PUT", where, Role.OPERATOR, json=change, If_Match='"1"')
    assert (changed.status, changed.headers["ETag"]) == (200, '"2"')
    assert (await changed.json())["name"] == "renamed"
    await problem(await api.ask("PUT", where, json=change, If_Match='"1"'), 412, "api.changed")

    await problem(await api.ask("DELETE", where, If_Match='"1"'), 412, "api.changed")
    assert (await api.ask("DELETE", where, If_Match='"2"')).status == 204
    await problem(await api.ask("GET", where), 404, "api.not_found")
    await problem(await api.ask("DELETE", where, If_Match="*"), 404, "api.not_found")


@pytest.mark.parametrize("path", NAMED)
async def test_a_name_is_taken_once(api: Api, problem: Check, path: str) -> None:
    first = await api.make(path, **NAMED[path])
    await problem(await api.ask("POST", f"{V1}/{path}", json=NAMED[path]), 409, "api.conflict")
    await api.make(path, **{**NAMED[path], "name": "other"})
    taking = {**NAMED[path], "name": "other"}
    response = await api.ask("PUT", f"{V1}/{path}/{first['id']}", json=taking, If_Match="*")
    await problem(response, 409, "api.conflict")


async def test_disks_are_kept_in_their_order_and_replaced_whole(api: Api, problem: Check) -> None:
    disks = [{"name": name, "source": f"/dev/{name}", "size_bytes": 512} for name in ("z", "a", "m")]
    made = await api.make("machines", name="one", disks=disks)
    assert made["disks"] == disks
    where = f"{V1}/machines/{made['id']}"
    changed = await api.ask("PUT", where, json={"name": "one", "disks": disks[1:]}, If_Match="*")
    assert (await changed.json())["disks"] == disks[1:]
    twice = await api.ask("PUT", where, json={"name": "one", "disks": disks[:1] * 2}, If_Match="*")
    await problem(twice, 409, "api.conflict")


async def test_what_is_used_is_not_deleted_and_what_is_not_there_is_not_used(
    api: Api, problem: Check
) -> None:
    await add_servers(api)
    policy = await api.make("policies", name="daily")
    group = await api.make(
        "groups",
        name="web",
        policy=policy["id"],
        process_server=PROCESS_SERVER,
        master_target=MASTER_TARGET,
    )
    machine = await api.make("machines", name="web-1", group=group["id"])
    for path in (f"policies/{policy['id']}", f"groups/{group['id']}"):
        await problem(await api.ask("DELETE", f"{V1}/{path}", If_Match="*"), 409, "api.conflict")
    for wrong in (
        {"policy": "pol-" + "0" * 32},
        {"process_server": MASTER_TARGET},
        {"master_target": PROCESS_SERVER},
        {"process_server": "ps-" + "0" * 32},
    ):
        response = await api.ask("POST", f"{V1}/groups", json={"name": "other", **wrong})
        await problem(response, 409, "api.conflict")
    listed = await (await api.ask("GET", f"{V1}/machines?group={group['id']}")).json()
    assert [item["id"] for item in listed["items"]] == [machine["id"]]
    for path in (f"machines/{machine['id']}", f"groups/{group['id']}", f"policies/{policy['id']}"):
        assert (await api.ask("DELETE", f"{V1}/{path}", If_Match="*")).status == 204


async def test_pages_go_through_a_list_without_gap_or_repetition(api: Api, problem: Check) -> None:
    made = {(await api.make("policies", name=f"policy-{number}"))["id"] for number in range(7)}
    found: list[str] = []
    path = f"{V1}/policies?limit=3"
    sizes = []
    while path:
        page = await (await api.ask("GET", path)).json()
        sizes.append(len(page["items"]))
        found += [item["id"] for item in page["items"]]
        path = f"{V1}/policies?limit=3&cursor={page['next']}" if page["next"] else ""
    assert sizes == [3, 3, 1] and set(found) == made and len(found) == 7
    for wrong in (
        "limit=0",
        "limit=201",
        "limit=x",
        "cursor=%00",
        "cursor=MTI=",
        "color=red",
        "limit=1&limit=2",
    ):
        await problem(await api.ask("GET", f"{V1}/policies?{wrong}"), 400, "api.malformed")


async def test_recovery_points_are_what_their_master_target_announced_last(api: Api) -> None:
    def point(number: int) -> Announced:
        return Announced(f"{number:032x}", 1_000, 2_000, "crash", 0, ("root", "data"))

    async with api.database.write() as connection:
        await points.announced(connection, MASTER_TARGET, "web", [point(number) for number in range(5)])
        await points.announced(connection, "mt-" + "c" * 32, "web", [point(number) for number in range(2)])
        await points.announced(connection, MASTER_TARGET, "mail", [point(1)])
    async with api.database.write() as connection:
        await points.announced(connection, MASTER_TARGET, "web", [point(number) for number in (3, 4, 5)])
    seen = []
    cursor: str | None = ""
    while cursor is not None:
        page = await (await api.ask("GET", f"{V1}/recovery-points?group=web&limit=2{cursor}")).json()
        seen += [(item["master_target"][:4], int(item["epoch"], 16)) for item in page["items"]]
        cursor = page["next"] and f"&cursor={page['next']}"
    assert sorted(seen) == [("mt-b", 3), ("mt-b", 4), ("mt-b", 5), ("mt-c", 0), ("mt-c", 1)]


# ------------------------------------------------------------------ repetitions


async def test_a_repeated_request_gets_its_answer_again_and_has_no_second_effect(api: Api) -> None:
    async def make() -> Any:
        return await api.ask("POST", f"{V1}/policies", json={"name": "once"}, Idempotency_Key="k-1")

    answers = await asyncio.gather(*(make() for _ in range(4)))
    assert {answer.status for answer in answers} == {201}
    assert len({(await answer.json())["id"] for answer in answers}) == 1
    assert sum("Idempotency-Replayed" in answer.headers for answer in answers) == 3
    assert {answer.headers["ETag"] for answer in answers} == {'"1"'}
    assert len({answer.headers["Location"] for answer in answers}) == 1
    assert len((await (await api.ask("GET", f"{V1}/policies")).json())["items"]) == 1


async def test_a_key_is_of_one_request_and_one_operator(api: Api, problem: Check) -> None:
    path = f"{V1}/policies"
    assert (await api.ask("POST", path, json={"name": "a"}, Idempotency_Key="k")).status == 201
    await problem(await api.ask("POST", path, json={"name": "b"}, Idempotency_Key="k"), 422, "api.key_reused")
    other = await api.ask("POST", f"{V1}/groups", json={"name": "a"}, Idempotency_Key="k")
    await problem(other, 422, "api.key_reused")
    theirs = await api.ask("POST", path, Role.OPERATOR, json={"name": "b"}, Idempotency_Key="k")
    assert theirs.status == 201 and "Idempotency-Replayed" not in theirs.headers


async def test_a_refused_request_may_be_sent_again_with_its_key(api: Api, problem: Check) -> None:
    first = await api.make("policies", name="taken")
    asking: dict[str, Any] = {"json": {"name": "taken"}, "Idempotency_Key": "k"}
    await problem(await api.ask("POST", f"{V1}/policies", **asking), 409, "api.conflict")
    assert (await api.ask("DELETE", f"{V1}/policies/{first['id']}", If_Match="*")).status == 204
    assert (await api.ask("POST", f"{V1}/policies", **asking)).status == 201


@pytest.mark.parametrize(
    ("path", "fields"), [("tokens", {"kind": "ps"}), ("operators", {"name": "ann", "role": "viewer"})]
)
async def test_a_secret_is_told_once_and_stands_nowhere(api: Api, path: str, fields: Any) -> None:
    asking: dict[str, Any] = {"json": fields, "Idempotency_Key": "k"}
    first = await (await api.ask("POST", f"{V1}/{path}", **asking)).json()
    again = await (await api.ask("POST", f"{V1}/{path}", **asking)).json()
    assert first["token"] and again == {**first, "token": None}
    listed = await (await api.ask("GET", f"{V1}/{path}")).text()
    noted = await (await api.ask("GET", f"{V1}/audit")).text()
    secret = first["token"][-20:]
    assert first["id"] in listed and first["id"] in noted
    assert secret not in listed and secret not in noted


async def test_a_join_token_is_read_by_those_who_join_and_expires(
    api: Api, clock: SetClock, problem: Check
) -> None:
    made = await api.make("tokens", kind="mt", note="second site", life_s=60)
    token = parse_token(made["token"])
    assert (token.id.hex(), token.pin) == (made["id"], api.installation.authority.pin)
    assert made["server_id"].startswith("mt-") and not made["used"]
    clock.advance(timedelta(seconds=61))
    other = await api.make("tokens", kind="ps")
    listed = await (await api.ask("GET", f"{V1}/tokens")).json()
    assert [item["id"] for item in listed["items"]] == [other["id"]]
    assert (await api.ask("DELETE", f"{V1}/tokens/{other['id']}")).status == 204
    await problem(await api.ask("DELETE", f"{V1}/tokens/{other['id']}"), 404, "api.not_found")


# ------------------------------------------------------------------ who is trusted, and settings


async def test_a_server_is_named_and_revoked_for_good(api: Api) -> None:
    await add_servers(api)
    where = f"{V1}/servers/{PROCESS_SERVER}"
    named = await api.ask("PUT", where, json={"name": "cloud", "address": "10.0.0.4:9443"}, If_Match='"1"')
    assert (await named.json())["name"] == "cloud"
    revoked = await (await api.ask("POST", f"{where}/revoke", If_Match='"2"')).json()
    assert revoked["revoked"] is not None
    assert (await (await api.ask("POST", f"{where}/revoke", If_Match="*")).json()) == revoked
    events = await (await api.ask("GET", f"{V1}/events")).json()
    assert [(item["code"], item["thing"]) for item in events["items"]] == [
        ("identity.revoked", PROCESS_SERVER)
    ]
    listed = await (await api.ask("GET", f"{V1}/servers?kind=mt")).json()
    assert [item["id"] for item in listed["items"]] == [MASTER_TARGET]


async def test_the_last_administrator_stays(api: Api, problem: Check) -> None:
    own = f"{V1}/operators/{api.ids[Role.ADMIN]}/revoke"
    await problem(await api.ask("POST", own, If_Match="*"), 409, "api.conflict")
    await api.make("operators", name="second", role="admin")
    assert (await api.ask("POST", own, If_Match="*")).status == 200
    await problem(await api.ask("GET", f"{V1}/operators"), 401, "api.unauthenticated")


async def test_settings_change_as_a_whole_and_by_revision(api: Api, problem: Check) -> None:
    path = f"{V1}/settings"
    before = await api.ask("GET", path)
    assert (await before.json())["renewal_grace_days"] == 30
    wanted = {"renewal_grace_days": 7, "events_keep_days": 5}
    etag = before.headers["ETag"]
    changed = await api.ask("PUT", path, json=wanted, If_Match=etag)
    assert wanted.items() <= (await changed.json()).items()
    await problem(await api.ask("PUT", path, json=wanted, If_Match=etag), 412, "api.changed")
    assert wanted.items() <= (await (await api.ask("GET", path)).json()).items()


# ------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"name": "a", "colour": "red"}',
        b'{"name": "a", "interval_s": "300"}',
        b'{"name": "a", "interval_s": 1e400}',
        b'{"name": "a\\u0000"}',
        b'{"name": "\\ud800"}',
        b'{"name": "\xff"}',
        b'{"name": "' + b"a" * 64 + b'"}',
        b'{"name": "a", "log_bytes": 9007199254740993}',
        b"[" * 100_000,
    ],
)
async def test_a_body_that_does_not_fit_is_refused_and_not_quoted(
    api: Api, problem: Check, body: bytes
) -> None:
    headers = {"Authorization": f"Bearer {api.tokens[Role.ADMIN]}", "Content-Type": "application/json"}
    response = await api.client.post(f"{V1}/policies", data=body, headers=headers)
    await problem(response, 400, "api.malformed")
    assert "red" not in await response.text()


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("machines", {"name": "a", "reference": "\0"}),
        ("machines", {"name": "a", "disks": [{"name": "a", "source": "/dev/\0", "size_bytes": 0}]}),
        ("connections", {**NAMED["connections"], "address": "\0"}),
        ("connections", {**NAMED["connections"], "account": "a\nb"}),
        ("tokens", {"kind": "ps", "note": "\0"}),
    ],
)
async def test_no_text_holds_what_postgresql_or_a_log_cannot(
    api: Api, problem: Check, path: str, fields: Any
) -> None:
    await problem(await api.ask("POST", f"{V1}/{path}", json=fields), 400, "api.malformed")
    group = await api.ask("GET", f"{V1}/recovery-points?group=%00")
    await problem(group, 400, "api.malformed")


async def test_bodies_of_the_wrong_size_or_type_are_refused(api: Api, problem: Check) -> None:
    headers = {"Authorization": f"Bearer {api.tokens[Role.ADMIN]}", "Content-Type": "application/json"}
    large = await api.client.post(f"{V1}/policies", data=b" " * 300_000, headers=headers)
    await problem(large, 413, "api.too_large")
    text = await api.client.post(
        f"{V1}/policies", data=b"{}", headers={**headers, "Content-Type": "text/plain"}
    )
    await problem(text, 415, "api.media_type")
    unwanted = await api.client.get(f"{V1}/policies", data=b"{}", headers=headers)
    await problem(unwanted, 400, "api.malformed")


async def test_paths_and_methods_that_are_not_there_are_told(api: Api, problem: Check) -> None:
    await problem(await api.ask("GET", f"{V1}/nothing"), 404, "api.not_found")
    await problem(await api.ask("GET", f"{V1}/groups/..%2f..%00"), 404, "api.not_found")
    response = await api.ask("PATCH", f"{V1}/groups")
    await problem(response, 405, "api.method_unknown")
    assert response.headers["Allow"] == "GET, POST"


async def test_every_answer_has_a_number_and_is_not_cached(api: Api) -> None:
    for path in (f"{V1}/groups", f"{V1}/nothing", "/healthz"):
        response = await api.ask("GET", path)
        assert len(response.headers["X-Request-Id"]) == 16
        assert response.headers["Cache-Control"] == "no-store"


async def test_metrics_count_requests_by_route_and_never_by_what_clients_make_up(api: Api) -> None:
    for path in ("groups", "groups", "made-up-by-a-client"):
        await api.ask("GET", f"{V1}/{path}")
    await api.ask("GET", f"{V1}/groups/grp-{'0' * 32}")
    text = await (await api.ask("GET", "/metrics", Role.VIEWER)).text()
    assert 'replicator_api_requests_total{method="GET",route="/api/v1/groups",status="200"} 2.0' in text
    assert 'route="/api/v1/groups/{id}",status="404"' in text
    assert "made-up" not in text and "0" * 32 not in text


async def test_healthz_says_no_more_than_alive_and_readyz_that_it_serves(api: Api) -> None:
    response = await api.ask("GET", "/healthz", role=None)
    assert (response.status, await response.text()) == (200, "alive\n")
    ready = await (await api.ask("GET", "/readyz", Role.VIEWER)).json()
    assert ready == {"ready": True, "state": "serving", "problems": []}
