"""How much host memory may be booked for sleeping engines and staged weights. Pure.

    budget = limit - reserve - launchers - engines, never more than agent.host_budget_bytes

limit      what this process may use: the host's memory, or the least limit of its cgroups.
reserve    for the system, the agent and page cache that nobody booked (agent.host_reserve_bytes);
           by default a tenth of the limit, at least 2 GiB, at most half of the limit.
launchers  their proportional set size, measured.
engines    GPU hosts: what the processes of engines that do not sleep hold, measured. CPU hosts:
           the whole device, since its memory is the same memory.

Worked example, a GPU host: 512 GiB - 51.2 GiB - 0.6 GiB - 4 engines of 3 GiB = 448.2 GiB.

RLIMIT_MEMLOCK is no bound here: it counts what mlock and RDMA pin. CUDA's pinned memory, which
level-1 sleep keeps the weights in, is the driver's own; containers with the usual 64 KiB use
gigabytes of it (read, not measured: no GPU was at hand); our systemd unit sets infinity anyway.

Rules this file keeps: pure; a setting that can't be is an error that names it.
"""

from __future__ import annotations

from runtime.sizes import GIB, sizes_apart
from runtime.wire.agent_messages import DeviceKind, DeviceReport

_LEAST_RESERVE_BYTES = 2 * GIB


def reserve_bytes(limit_bytes: int, declared_bytes: int | None) -> int:
    """What is never booked. Raises ValueError if that is all there is."""
    if declared_bytes is None:
        return min(max(limit_bytes // 10, _LEAST_RESERVE_BYTES), limit_bytes // 2)
    if declared_bytes >= limit_bytes:
        raise ValueError(
            f"agent.host_reserve_bytes = {declared_bytes} leaves nothing of the {limit_bytes} bytes"
            " that this host (or the agent's cgroup) has; write less, or leave it out"
        )
    return declared_bytes


def check_budget(limit_bytes: int, declared_bytes: int | None) -> None:
    """Raises ValueError for a budget that this host can't have."""
    if declared_bytes is not None and declared_bytes > limit_bytes:
        raise ValueError(
            f"agent.host_budget_bytes = {declared_bytes} is more than the {limit_bytes} bytes that"
            " this host (or the agent's cgroup) has; write less, or leave it out"
        )


def budget_bytes(
    *,
    limit_bytes: int,
    reserve_bytes: int,
    launcher_bytes: int,
    engine_bytes: int,
    declared_bytes: int | None,
) -> int:
    """As above; `engine_bytes` as of `engines_bytes`."""
    free = max(0, limit_bytes - reserve_bytes - launcher_bytes - engine_bytes)
    return free if declared_bytes is None else min(free, declared_bytes)


def engines_bytes(kind: DeviceKind, devices: tuple[DeviceReport, ...], awake_bytes: int) -> int:
    """What engines take that is not booked; `awake_bytes`: of the processes that do not sleep."""
    if kind == "cpu":
        return sum(d.memory_total_bytes for d in devices)
    return awake_bytes


def level_1_refusal(host_bytes: int, most_bytes: int) -> str | None:
    """Why weights of `host_bytes` can't be kept in host memory; None where they can.

    `most_bytes`: the budget of a node that runs nothing.
    """
    if host_bytes <= most_bytes:
        return None
    taken, most = sizes_apart(host_bytes, max(0, most_bytes))
    return (
        f"its weights take {taken} of host memory, and this node can book {most}"
        " (memory or cgroup limit, less agent.host_reserve_bytes; at most"
        " agent.host_budget_bytes)"
    )
