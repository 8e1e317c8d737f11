"""Turns a start command into the process to run on this node.

Rules this file keeps: whatever is wrong with a start is said in words, before a process exists.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from runtime.contract.engine_policy import ENGINE_ENV, node_problems
from runtime.engine.contract import Launch, LaunchContext
from runtime.engine.select import get_engine
from runtime.wire.agent_messages import DeviceKind, DeviceReport, StartReplica

log = logging.getLogger("stoker.agent")


class Place(Struct, frozen=True, kw_only=True):
    """What every start on this node shares."""

    host: str  # the address engines listen on
    device_kind: DeviceKind
    python: str
    cache_dir: str
    engine_env: tuple[str, ...] = ENGINE_ENV
    media_domains: tuple[str, ...] = ()


class Plan(Struct, frozen=True, kw_only=True):
    """A start that is ready to be spawned."""

    launch: Launch
    context: LaunchContext
    shell_key: str | None = None  # of an engine that is forked, or needs no parent


class BadStart(Exception):
    """A start that cannot be; `kind` as in ReplicaReport.exit_kind."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(words)
        self.kind = kind


def make_plan(
    command: StartReplica,
    devices: Sequence[DeviceReport],
    place: Place,
    port: int,
    model_path: str,
    load_format: str | None = None,
    adapter_index: str = "",
    version: str | None = None,
) -> Plan:
    """The process of one replica, with fresh keys, to listen on `port`. Blocks. Raises BadStart.

    `load_format`: of the weights; None: the engine's own, or the spec's. `adapter_index`: as in
    LaunchContext. `version`: the engine's, on this node.
    """
    spec = command.spec
    try:
        if problems := node_problems(spec, place.engine_env, place.media_domains):
            raise ValueError(f"{spec.name}: " + "; ".join(map(str, problems)))
        context = msgspec.structs.replace(
            _context(command, devices, place, port, model_path),
            load_format=load_format,
            adapter_index=adapter_index,
        )
        engine = get_engine(spec.engine)
        return Plan(
            launch=engine.launch(spec, context),
            context=context,
            shell_key=engine.shell_key(spec, context, version),
        )
    except ValueError as error:
        raise BadStart("bad_argument", str(error)) from None
    except Exception as error:  # an engine's fault must not end the agent
        log.exception("%s: planning its start failed", command.replica_id)
        raise BadStart("crash", f"planning its start failed: {error!r}") from None


def make_repoint(
    command: StartReplica,
    devices: Sequence[DeviceReport],
    place: Place,
    port: int,
    control_key: str,
    model_path: str,
) -> LaunchContext:
    """Where an engine runs that is pointed at the model of `command`, with a fresh route key.
    Raises BadStart."""
    try:
        fresh = _context(command, devices, place, port, model_path)
    except ValueError as error:
        raise BadStart("bad_argument", str(error)) from None
    return msgspec.structs.replace(fresh, control_key=control_key)


def _context(
    command: StartReplica,
    devices: Sequence[DeviceReport],
    place: Place,
    port: int,
    model_path: str,
) -> LaunchContext:
    """Raises ValueError where a device is not on this node."""
    chosen = _chosen(command, devices)
    return LaunchContext(
        replica_id=command.replica_id,
        host=place.host,
        port=port,
        route_key=secrets.token_urlsafe(24),
        control_key=secrets.token_urlsafe(24),
        device_kind=place.device_kind,
        device_ids=command.device_ids,
        device_indexes=tuple(d.index for d in chosen),
        device_bytes=command.device_bytes,
        kv_bytes=command.kv_bytes,
        device_total_bytes=min(d.memory_total_bytes for d in chosen),
        model_path=model_path,
        revision=None,
        python=place.python,
        cache_dir=place.cache_dir,
    )


def _chosen(command: StartReplica, devices: Sequence[DeviceReport]) -> list[DeviceReport]:
    here = {device.device_id: device for device in devices}
    missing = [d for d in command.device_ids if d not in here]
    if missing or not command.device_ids:
        raise ValueError(
            f"devices {missing or 'none'} are not on this node; it has {', '.join(here)}"
        )
    return [here[d] for d in command.device_ids]
