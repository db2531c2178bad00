"""Azure's management interface (ARM), as far as disks, snapshots, restore points and VMs go, over real HTTPS.

It keeps state, runs long operations that are looked at a few times before they are over, refuses what Azure
refuses (a deletion under an open access, snapshots beyond the limits), and fails where a test tells it to.
What snapshots hold is the business of `Exports`. Not here: any of our own classes.
"""

import ipaddress
import json
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

SUBSCRIPTION = "11111111-2222-3333-4444-555555555555"
TOKEN = "token-of-the-test"
IDENTITY_HEADER = "header-of-the-test"
SOON = "retry-after-ms"  # looks at an operation under way: as often as the service says
SECRET = "sig-that-nobody-may-print"
COMPUTE = "/subscriptions/{subscription}/resourceGroups/{group}/providers/Microsoft.Compute"
Answer = web.Response
Handler = Callable[[web.Request], Awaitable[Answer]]


class Exports(Protocol):
    """What snapshots hold. A content is whatever `capture` answers."""

    async def capture(self, disk: str) -> Any: ...

    async def url(self, content: Any, ends: datetime) -> str: ...

    async def discard(self, content: Any) -> None: ...


class NoExports:
    """URLs that lead nowhere, a new one each time."""

    def __init__(self) -> None:
        self._numbers = count(1)

    async def capture(self, disk: str) -> Any:
        return disk

    async def url(self, content: Any, ends: datetime) -> str:
        se = ends.strftime("%Y-%m-%dT%H:%M:%SZ").replace(":", "%3A")
        return f"https://md-{next(self._numbers)}.example/{content}?sv=2024&se={se}&sig={SECRET}"

    async def discard(self, content: Any) -> None:
        pass


@dataclass
class Fault:
    """An answer in place of the true one, for the next requests that fit.

    `after`: the request is carried out first. `status` 0: the connection is cut instead of an answer.
    `operation`: the request is accepted, and its operation fails.
    """

    method: str
    part: str
    times: int = 1
    status: int = 500
    code: str = "InternalError"
    retry_after: str | None = None
    after: bool = False
    operation: bool = False


@dataclass
class Access:
    url: str
    ends: datetime


@dataclass
class Held:
    """Something that can be exported: a snapshot, or a disk in a restore point."""

    body: dict[str, Any]
    content: Any
    access: Access | None = None
    copied: float = 100.0


@dataclass
class Point:
    body: dict[str, Any]
    disks: dict[str, Held]


@dataclass
class Collection:
    body: dict[str, Any]
    points: dict[str, Point] = field(default_factory=dict)


@dataclass
class Operation:
    looks: int
    result: Any
    error: str | None = None


class FakeArm:
    """One subscription, one resource group. `polls`: how often an operation is looked at before it is over.

    Args:
        folder: for the certificate.
        exports: what snapshots hold.
    """

    def __init__(self, folder: Path, exports: Exports | None = None) -> None:
        self.exports: Exports = exports or NoExports()
        self.polls = 2
        self.copy_step = 100.0  # per cent of the background copy that are done between two looks
        self.imported_size = 1 << 20
        self.ignore_power = False  # the machine does not do what it is told
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.disks: dict[str, dict[str, Any]] = {}
        self.snapshots: dict[str, Held] = {}
        self.vms: dict[str, dict[str, Any]] = {}
        self.collections: dict[str, Collection] = {}
        self.ca = folder / "arm-ca.pem"
        self.endpoint = ""
        self.identity_endpoint = ""  # of a managed identity, as machines in Azure have one
        self._folder = folder
        self._operations: dict[str, Operation] = {}
        self._numbers = count(1)
        self._runners: list[web.AppRunner] = []

    # ------------------------------------------------------------------ what tests arrange and ask

    def add_disk(
        self, name: str, size: int, *, vm: str | None = None, sku: str = "Premium_LRS", **more: Any
    ) -> None:
        self.disks[name] = {
            "id": self.id("disks", name),
            "name": name,
            "location": "westeurope",
            "sku": {"name": sku},
            "managedBy": self.id("virtualMachines", vm) if vm else None,
            "properties": {
                "uniqueId": f"unique-{name}-{next(self._numbers)}",
                "diskSizeBytes": size,
                "provisioningState": "Succeeded",
                "creationData": {"createOption": "Empty"},
                **more,
            },
        }
        if vm:
            machine = self.vms.setdefault(vm, {"power": "running", "disks": []})
            machine["disks"].append(name)

    def id(self, kind: str, name: str) -> str:
        return f"{COMPUTE.format(subscription=SUBSCRIPTION, group='rg')}/{kind}/{name}"

    def census(self) -> dict[str, int]:
        """What is there that costs money or opens a door."""
        points = [point for one in self.collections.values() for point in one.points.values()]
        held = [*self.snapshots.values(), *(disk for point in points for disk in point.disks.values())]
        return {
            "snapshots": len(self.snapshots),
            "collections": len(self.collections),
            "points": len(points),
            "open": sum(one.access is not None for one in held),
        }

    def count(self, method: str, part: str) -> int:
        return sum(line.startswith(f"{method} ") and part in line for line in self.requests)

    # ------------------------------------------------------------------ serving

    async def start(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*_certificate(self._folder, self.ca))
        app = web.Application(middlewares=[self._middleware])  # type: ignore[list-item]
        for (method, path), handler in routes().items():
            app.router.add_route(method, path, getattr(self, handler))
        app.router.add_get("/operations/{name}", self._look)
        app.router.add_get("/results/{name}", self._result)
        self.endpoint = f"https://127.0.0.1:{await self._serve(app, context)}"
        identity = web.Application()
        identity.router.add_get("/token", self._token)
        self.identity_endpoint = f"http://127.0.0.1:{await self._serve(identity, None)}/token"

    async def _serve(self, app: web.Application, context: ssl.SSLContext | None) -> int:
        """The port on which it listens."""
        runner = web.AppRunner(app, shutdown_timeout=1)
        await runner.setup()
        self._runners.append(runner)
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        return int(runner.addresses[0][1])

    async def stop(self) -> None:
        for runner in self._runners:
            await runner.cleanup()

    async def _token(self, request: web.Request) -> Answer:
        if request.headers.get("X-IDENTITY-HEADER") != IDENTITY_HEADER:
            return _error(401, "WrongHeader")
        return web.json_response(
            {"access_token": TOKEN, "expires_on": 1 << 40, "resource": "arm", "token_type": "Bearer"}
        )

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Handler) -> Answer:
        line = f"{request.method} {request.path}"
        self.requests.append(line)
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _error(401, "InvalidAuthenticationToken")
        if "api-version" not in request.query and request.path.startswith("/subscriptions"):
            return _error(400, "MissingApiVersionParameter")
        fault = next(
            (f for f in self.faults if f.times and f.method == request.method and f.part in line), None
        )
        if fault is None:
            return await handler(request)
        fault.times -= 1
        if fault.operation:
            return self._accept(request, None, error=fault.code)
        if fault.after:
            await handler(request)
        if fault.status == 0:
            assert request.transport is not None
            request.transport.abort()
        answer = _error(fault.status or 500, fault.code)
        if fault.retry_after is not None:
            answer.headers["Retry-After"] = fault.retry_after
        return answer

    def _accept(self, request: web.Request, result: Any, error: str | None = None) -> Answer:
        """202: the request's effect is there, as a look at the operation tells some looks later."""
        name = f"op-{next(self._numbers)}"
        self._operations[name] = Operation(self.polls, result, error)
        answer = web.json_response({}, status=202)
        answer.headers["Azure-AsyncOperation"] = f"{self.endpoint}/operations/{name}?api-version=1"
        answer.headers["Location"] = f"{self.endpoint}/results/{name}?api-version=1"
        answer.headers[SOON] = "1"
        return answer

    async def _look(self, request: web.Request) -> Answer:
        operation = self._operations[request.match_info["name"]]
        operation.looks -= 1
        if operation.looks > 0:
            return web.json_response({"status": "InProgress"}, headers={SOON: "1"})
        if operation.error is not None:
            told = {"code": operation.error, "message": "it was told to fail"}
            return web.json_response({"status": "Failed", "error": told})
        return web.json_response({"status": "Succeeded"})

    async def _result(self, request: web.Request) -> Answer:
        return web.json_response(self._operations[request.match_info["name"]].result)

    # ------------------------------------------------------------------ disks and snapshots

    async def _get_disk(self, request: web.Request) -> Answer:
        return _found(self.disks.get(request.match_info["name"]))

    async def _put_disk(self, request: web.Request) -> Answer:
        name, body = request.match_info["name"], await request.json()
        wanted = body["properties"]["creationData"]
        if wanted["createOption"] != "Import" or not (wanted["sourceUri"] and wanted["storageAccountId"]):
            return _error(400, "InvalidParameter")
        if name not in self.disks:
            self.add_disk(name, self.imported_size, sku=body["sku"]["name"], **body["properties"])
            self.disks[name] |= {"tags": body["tags"], "location": body["location"]}
        return self._accept(request, self.disks[name])

    async def _list_snapshots(self, request: web.Request) -> Answer:
        return web.json_response({"value": [self._told(held) for held in self.snapshots.values()]})

    async def _get_snapshot(self, request: web.Request) -> Answer:
        held = self.snapshots.get(request.match_info["name"])
        if held is None:
            return _found(None)
        told = self._told(held)
        held.copied = min(100.0, held.copied + self.copy_step)
        return web.json_response(told)

    async def _put_snapshot(self, request: web.Request) -> Answer:
        name, body = request.match_info["name"], await request.json()
        wanted = body["properties"]
        source = wanted["creationData"]["sourceResourceId"].rsplit("/", 1)[-1]
        disk = self.disks.get(source)
        if disk is None:
            return _found(None)
        if not wanted.get("incremental") or wanted["creationData"]["createOption"] != "Copy":
            return _error(400, "InvalidParameter")
        if name not in self.snapshots:
            unique = disk["properties"]["uniqueId"]
            family = [one for one in self.snapshots.values() if _source(one) == unique]
            recent = datetime.now(UTC) - timedelta(minutes=5)
            if sum(_created(one) > recent for one in family) >= 7 or len(family) >= 500:
                return _error(409, "OperationNotAllowed")
            made = _now()
            properties = {
                "timeCreated": made,
                "provisioningState": "Succeeded",
                "diskSizeBytes": disk["properties"]["diskSizeBytes"],
                "incremental": True,
                "networkAccessPolicy": wanted.get("networkAccessPolicy", "AllowAll"),
                "diskAccessId": wanted.get("diskAccessId"),
                "creationData": {**wanted["creationData"], "sourceUniqueId": unique},
            }
            told = {"id": self.id("snapshots", name), "name": name, "properties": properties}
            told |= {key: body[key] for key in ("location", "tags", "sku") if key in body}
            content = await self.exports.capture(source)
            self.snapshots[name] = Held(told, content, copied=min(100.0, self.copy_step))
        return self._accept(request, self.snapshots[name].body)

    async def _delete_snapshot(self, request: web.Request) -> Answer:
        held = self.snapshots.get(request.match_info["name"])
        if held is None:
            return web.Response(status=204)
        if held.access is not None:
            return _error(409, "OperationNotAllowed")
        await self.exports.discard(held.content)
        del self.snapshots[request.match_info["name"]]
        return self._accept(request, {})

    async def _grant_snapshot(self, request: web.Request) -> Answer:
        held = self.snapshots.get(request.match_info["name"])
        if held is None:
            return _found(None)
        family = [one for one in self.snapshots.values() if _source(one) == _source(held)]
        if held.access is None and sum(one.access is not None for one in family) >= 5:
            return _error(409, "OperationNotAllowed")
        return await self._grant(request, held)

    async def _revoke_snapshot(self, request: web.Request) -> Answer:
        return self._revoke(request, self.snapshots.get(request.match_info["name"]))

    async def _grant(self, request: web.Request, held: Held) -> Answer:
        wanted = await request.json()
        if wanted["access"] != "Read" or held.copied < 100:
            return _error(400, "InvalidParameter")
        if held.access is not None and held.access.ends < datetime.now(UTC):
            held.access = None
        if held.access is None:
            ends = datetime.now(UTC) + timedelta(seconds=wanted["durationInSeconds"])
            held.access = Access(await self.exports.url(held.content, ends), ends)
        return self._accept(request, {"accessSAS": held.access.url})

    def _revoke(self, request: web.Request, held: Held | None) -> Answer:
        if held is None:
            return _found(None)
        held.access = None
        return self._accept(request, {})

    def _told(self, held: Held) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(json.dumps(held.body))
        told["properties"]["diskState"] = "ActiveSAS" if held.access is not None else "Unattached"
        told["properties"]["completionPercent"] = held.copied
        return told

    # ------------------------------------------------------------------ virtual machines

    async def _get_vm(self, request: web.Request) -> Answer:
        name = request.match_info["name"]
        machine = self.vms.get(name)
        if machine is None:
            return _found(None)
        first, *others = [{"managedDisk": {"id": self.id("disks", disk)}} for disk in machine["disks"]]
        storage = {"osDisk": first, "dataDisks": [{"lun": lun, **one} for lun, one in enumerate(others)]}
        properties = {"storageProfile": storage, "provisioningState": "Succeeded"}
        told = {"id": self.id("virtualMachines", name), "name": name, "location": "westeurope"}
        return web.json_response(told | {"properties": properties})

    async def _view_vm(self, request: web.Request) -> Answer:
        machine = self.vms.get(request.match_info["name"])
        if machine is None:
            return _found(None)
        codes = ["ProvisioningState/succeeded", f"PowerState/{machine['power']}"]
        return web.json_response({"statuses": [{"code": code} for code in codes]})

    async def _deallocate(self, request: web.Request) -> Answer:
        return self._power(request, "deallocated")

    async def _start_vm(self, request: web.Request) -> Answer:
        return self._power(request, "running")

    def _power(self, request: web.Request, state: str) -> Answer:
        machine = self.vms.get(request.match_info["name"])
        if machine is None:
            return _found(None)
        if not self.ignore_power:
            machine["power"] = state
        return self._accept(request, {})

    # ------------------------------------------------------------------ restore points

    async def _put_collection(self, request: web.Request) -> Answer:
        name, body = request.match_info["name"], await request.json()
        told = {"id": self.id("restorePointCollections", name), "name": name, **body}
        self.collections.setdefault(name, Collection(told))
        return web.json_response(self.collections[name].body)

    async def _get_collection(self, request: web.Request) -> Answer:
        found = self.collections.get(request.match_info["name"])
        if found is None:
            return _found(None)
        told: dict[str, Any] = json.loads(json.dumps(found.body))
        if request.query.get("$expand") == "restorePoints":
            told["properties"]["restorePoints"] = [point.body for point in found.points.values()]
        return web.json_response(told)

    async def _delete_collection(self, request: web.Request) -> Answer:
        if self.collections.pop(request.match_info["name"], None) is None:
            return web.Response(status=204)
        return self._accept(request, {})

    async def _put_point(self, request: web.Request) -> Answer:
        name, body = request.match_info["point"], await request.json()
        collection = self.collections.get(request.match_info["name"])
        if collection is None:
            return _found(None)
        if name not in collection.points:
            machine = collection.body["properties"]["source"]["id"].rsplit("/", 1)[-1]
            wanted = body["properties"]
            left_out = {one["id"].lower() for one in wanted.get("excludeDisks", [])}
            properties = {"timeCreated": _now(), "provisioningState": "Succeeded"}
            properties["consistencyMode"] = wanted["consistencyMode"]
            disks = {}
            for disk in self.vms[machine]["disks"]:
                source = self.id("disks", disk)
                if source.lower() not in left_out:
                    held = {"name": f"{disk}_point", "properties": {"sourceResourceId": source}}
                    copied = min(100.0, self.copy_step)
                    disks[f"{disk}_point"] = Held(held, await self.exports.capture(disk), copied=copied)
            collection.points[name] = Point({"name": name, "properties": properties}, disks)
        answer = self._accept(request, {})
        operation = answer.headers["Azure-AsyncOperation"]
        created = web.json_response(collection.points[name].body, status=201)
        created.headers["Azure-AsyncOperation"] = operation
        created.headers[SOON] = "1"
        return created

    def _point(self, request: web.Request) -> Point | None:
        collection = self.collections.get(request.match_info["name"])
        return collection.points.get(request.match_info["point"]) if collection is not None else None

    async def _get_point(self, request: web.Request) -> Answer:
        point = self._point(request)
        return _found(point.body if point is not None else None)

    async def _delete_point(self, request: web.Request) -> Answer:
        point = self._point(request)
        if point is None:
            return web.Response(status=204)
        if any(disk.access is not None for disk in point.disks.values()):
            return _error(409, "OperationNotAllowed")
        for disk in point.disks.values():
            await self.exports.discard(disk.content)
        del self.collections[request.match_info["name"]].points[request.match_info["point"]]
        return self._accept(request, {})

    async def _list_disk_points(self, request: web.Request) -> Answer:
        point = self._point(request)
        if point is None:
            return _found(None)
        told = [self._told(disk) for disk in point.disks.values()]
        for disk in point.disks.values():
            disk.copied = min(100.0, disk.copied + self.copy_step)
        return web.json_response({"value": told})

    async def _grant_disk_point(self, request: web.Request) -> Answer:
        point = self._point(request)
        held = point.disks.get(request.match_info["disk"]) if point is not None else None
        return _found(None) if held is None else await self._grant(request, held)

    async def _revoke_disk_point(self, request: web.Request) -> Answer:
        point = self._point(request)
        return self._revoke(
            request, point.disks.get(request.match_info["disk"]) if point is not None else None
        )


def routes() -> dict[tuple[str, str], str]:
    """Every request that is answered, and by which method."""
    collection = "/restorePointCollections/{name}"
    point = f"{collection}/restorePoints/{{point}}"
    disk_points = f"{point}/diskRestorePoints"
    table = {
        ("GET", "/disks/{name}"): "_get_disk",
        ("PUT", "/disks/{name}"): "_put_disk",
        ("GET", "/snapshots"): "_list_snapshots",
        ("GET", "/snapshots/{name}"): "_get_snapshot",
        ("PUT", "/snapshots/{name}"): "_put_snapshot",
        ("DELETE", "/snapshots/{name}"): "_delete_snapshot",
        ("POST", "/snapshots/{name}/beginGetAccess"): "_grant_snapshot",
        ("POST", "/snapshots/{name}/endGetAccess"): "_revoke_snapshot",
        ("GET", "/virtualMachines/{name}"): "_get_vm",
        ("GET", "/virtualMachines/{name}/instanceView"): "_view_vm",
        ("POST", "/virtualMachines/{name}/deallocate"): "_deallocate",
        ("POST", "/virtualMachines/{name}/start"): "_start_vm",
        ("PUT", collection): "_put_collection",
        ("GET", collection): "_get_collection",
        ("DELETE", collection): "_delete_collection",
        ("PUT", point): "_put_point",
        ("GET", point): "_get_point",
        ("DELETE", point): "_delete_point",
        ("GET", disk_points): "_list_disk_points",
        ("POST", f"{disk_points}/{{disk}}/beginGetAccess"): "_grant_disk_point",
        ("POST", f"{disk_points}/{{disk}}/endGetAccess"): "_revoke_disk_point",
    }
    return {(method, COMPUTE + path): handler for (method, path), handler in table.items()}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _source(held: Held) -> str:
    return str(held.body["properties"]["creationData"]["sourceUniqueId"])


def _created(held: Held) -> datetime:
    return datetime.fromisoformat(held.body["properties"]["timeCreated"])


def _found(body: dict[str, Any] | None) -> Answer:
    return _error(404, "ResourceNotFound") if body is None else web.json_response(body)


def _error(status: int, code: str) -> Answer:
    return web.json_response({"error": {"code": code, "message": f"this is {code}"}}, status=status)


def _certificate(folder: Path, ca: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that vouches for itself; its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "arm of a test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    ca.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret = folder / "arm-key.pem"
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    secret.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return ca, secret
