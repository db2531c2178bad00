"""Stops and starts a VM, and does not believe it before Azure's own view of the machine says so.

A planned failover loses nothing only if the machine is really down before the last snapshot. Not here: what
is done in between.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from azure.core.polling import AsyncLROPoller
from azure.mgmt.compute.aio import ComputeManagementClient

from replicator.azure.arm import REPEATABLE, ResourceRef, asking
from replicator.errors import SourceError

DOWN: Final = "deallocated"  # "stopped" is not enough: the machine still has its host, and is paid for
UP: Final = "running"


async def power_state(client: ComputeManagementClient, vm: ResourceRef) -> str:
    """What a VM does now: ``running``, ``stopped``, ``deallocated``, in between; empty if Azure cannot tell.

    Raises:
        SourceError: ``compute.missing``. Others as ``arm.asking``.
    """
    with asking(f"looking at VM {vm.name}"):
        view = await client.virtual_machines.instance_view(vm.group, vm.name)
    codes = [status.code or "" for status in view.statuses or []]
    return next((code.removeprefix("PowerState/") for code in codes if code.startswith("PowerState/")), "")


async def stop(client: ComputeManagementClient, vm: ResourceRef) -> None:
    """Shut a VM down, its guest in order, and give its host back. One that is down stays so.

    Raises:
        SourceError: ``compute.not_stopped``. Others as ``arm.asking``.
    """
    state = await _brought(client, vm, DOWN, "stopping", client.virtual_machines.begin_deallocate)
    if state != DOWN:
        raise SourceError(
            "compute.not_stopped",
            f"VM {vm.name} was told to stop, and is {state or 'in a state that Azure does not tell'}",
            cause="somebody or something, such as an automation, has started it again",
            fix="stop it in the portal and see that it stays down, then give the same command again",
        )


async def start(client: ComputeManagementClient, vm: ResourceRef) -> None:
    """Start a VM. One that is up stays so.

    Raises:
        SourceError: ``compute.not_started``. Others as ``arm.asking``.
    """
    state = await _brought(client, vm, UP, "starting", client.virtual_machines.begin_start)
    if state != UP:
        raise SourceError(
            "compute.not_started",
            f"VM {vm.name} was told to start, and is {state or 'in a state that Azure does not tell'}",
            cause="its size is not to be had just now, or somebody has stopped it again",
            fix="look at the machine's activity log in the portal",
        )


async def _brought(
    client: ComputeManagementClient,
    vm: ResourceRef,
    wanted: str,
    doing: str,
    begin: Callable[..., Awaitable[AsyncLROPoller[None]]],
) -> str:
    """What a VM does once it was brought to do ``wanted``, if it did not yet."""
    state = await power_state(client, vm)
    if state == wanted:
        return state
    with asking(f"{doing} VM {vm.name}"):
        poller = await begin(vm.group, vm.name, **REPEATABLE)
        await poller.result()
    return await power_state(client, vm)
