"""Which live processes belong to which replica, read from /proc; and what a child starts with.

Rules this file keeps:
- a process belongs to a replica by the markers in its environment, by its session or by its
  cgroup: engines orphan their children, so parenthood says nothing;
- a pid alone names nothing, since pids are used again: a pid and its start time do;
- a zombie is dead.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from runtime import places
from runtime.contract.engine_policy import ENGINE_ENV, passed
from runtime.wire.names import REPLICA_ID

REPLICA_MARK = "STOKER_REPLICA_ID"
NODE_MARK = "STOKER_NODE_ID"
STATE_MARK = "STOKER_STATE_DIR"  # tells two agents of one node id apart, as tests run them

_PASSED = frozenset({
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY",
})  # fmt: skip
_PASSED_PREFIXES = ("HF_", "AWS_")  # what fetches hf: and s3:// sources
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PASSES = 100  # of a scan, on a host that starts processes faster than they can be looked at


class Owner(Struct, frozen=True):
    """The agent that processes are marked with."""

    node_id: str
    state_dir: str

    def marks(self, replica_id: str) -> dict[str, str]:
        """The environment that makes a process, and all it starts, this replica's."""
        return {
            REPLICA_MARK: replica_id,
            NODE_MARK: self.node_id,
            STATE_MARK: self.state_dir,
            # setproctitle, which vLLM calls, would overwrite /proc/<pid>/environ, the marks too.
            "SPT_NOENV": "1",
        }


class MainProcess(Struct, frozen=True):
    """A replica's main process: the leader of its session. `start` as in `start_ticks`."""

    pid: int
    start: int


def base_environment(
    environ: Mapping[str, str], engine_env: Sequence[str] = ENGINE_ENV
) -> dict[str, str]:
    """What an engine gets of the agent's own environment: no secret of the agent's."""
    return passed(environ, engine_env) | {
        name: value
        for name, value in environ.items()
        if name.upper() in _PASSED or name.startswith(_PASSED_PREFIXES)
    }


def start_ticks(pid: int) -> int | None:
    """When a live process started, in clock ticks since boot; None if it is dead or a zombie."""
    stat = _stat(pid)
    return stat.start if stat else None


def age_s(leader: MainProcess) -> float:
    """Seconds since the process started."""
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return max(0.0, uptime_s - leader.start / _TICKS_PER_S)


class _Stat(Struct, frozen=True):
    session: int
    start: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name, in parentheses, may hold spaces and parentheses itself.
    fields = text[text.rindex(")") + 2 :].split()
    if fields[0] in "ZXx":
        return None
    return _Stat(session=int(fields[3]), start=int(fields[19]))


def _mark_of(pid: int, owner: Owner) -> str | None:
    """Raises ProcessLookupError if the process is gone."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except PermissionError:
        return None  # it is not ours to look into
    except OSError:
        raise ProcessLookupError from None
    if REPLICA_MARK.encode() not in raw:
        return None
    environ = dict(
        entry.partition("=")[::2] for entry in raw.decode(errors="replace").split("\0") if entry
    )
    if environ.get(NODE_MARK) != owner.node_id or environ.get(STATE_MARK) != owner.state_dir:
        return None
    replica_id = environ.get(REPLICA_MARK, "")  # it names files, and a process may change its own
    return replica_id if REPLICA_ID.fullmatch(replica_id) else None


def scan(owner: Owner, leaders: Mapping[str, MainProcess]) -> dict[str, set[int]]:
    """Every live process of each replica of `owner`'s, known (in `leaders`) or not. Blocks.

    A process may end, and leave a child, between the listing and the look at it. So whatever was
    born meanwhile is looked at too, as long as one of the last look could be the parent of ours:
    it was ours, or it was gone. What others start all the time is not waited for.
    """
    found: dict[str, set[int]] = {}
    seen = {os.getpid()}
    parents = True
    for _ in range(_PASSES):
        if not parents:
            break
        born = _pids() - seen
        seen |= born
        parents = False
        for pid in born:
            try:
                replica_id = _replica_of(pid, owner, leaders)
            except ProcessLookupError:
                parents = True
            else:
                if replica_id:
                    found.setdefault(replica_id, set()).add(pid)
                    parents = True
    return found


def _pids() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def _replica_of(pid: int, owner: Owner, leaders: Mapping[str, MainProcess]) -> str | None:
    """Raises ProcessLookupError if the process is gone, or a zombie."""
    stat = _stat(pid)
    if stat is None:
        raise ProcessLookupError
    for replica_id, leader in leaders.items():
        if stat.session == leader.pid and _is_session_of(stat.session, leader):
            return replica_id
    return _mark_of(pid, owner)


def _is_session_of(session: int, leader: MainProcess) -> bool:
    """False where the leader's pid was used again, by a process that opened a session too."""
    start = start_ticks(session)
    return start is None or start == leader.start


class Cgroups:
    """A cgroup of its own for each replica, below the agent's, where cgroup v2 allows it."""

    def __init__(self, parent: Path | None) -> None:
        self._parent = parent

    @classmethod
    def open(cls, owner: Owner) -> Cgroups:
        """Below the agent's own cgroup. Raises OSError, naming it, where that is not possible."""
        whose = f"{owner.node_id}\0{owner.state_dir}".encode()
        parent = _own_cgroup() / f"stoker-{hashlib.sha256(whose).hexdigest()[:12]}"
        parent.mkdir(exist_ok=True)
        return cls(parent)

    def replica_ids(self) -> list[str]:
        """The replicas that have one."""
        if not self._parent:
            return []
        try:
            return [p.name for p in self._parent.iterdir() if p.is_dir()]
        except FileNotFoundError:
            return []  # another agent of this state_dir came and went

    def add(self, replica_id: str, pid: int) -> None:
        """Move a process, and all that it starts from now on, into the replica's cgroup."""
        if self._parent:
            folder = places.below(self._parent, replica_id)
            with contextlib.suppress(OSError):  # the marks find it all the same
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "cgroup.procs").write_text(str(pid))

    def pids(self, replica_id: str) -> set[int]:
        """The live processes in it."""
        if not self._parent:
            return set()
        try:
            listed = places.below(self._parent, replica_id, "cgroup.procs").read_text().split()
        except OSError:
            return set()
        return {int(pid) for pid in listed if start_ticks(int(pid)) is not None}

    def remove(self, replica_id: str) -> None:
        """Remove an empty cgroup; one that is not empty or not there is left alone."""
        if self._parent:
            with contextlib.suppress(OSError):
                places.below(self._parent, replica_id).rmdir()

    def close(self) -> None:
        """Remove the parent if no replica is left in it."""
        if self._parent:
            with contextlib.suppress(OSError):
                self._parent.rmdir()


def _own_cgroup() -> Path:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    roots = [fields[1] for fields in mounts if fields[2] == "cgroup2"]
    own = [
        line.removeprefix("0::")
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if line.startswith("0::")
    ]
    if not roots or not own:
        raise OSError("this host has no cgroup v2")
    return Path(roots[0]) / own[0].lstrip("/")
