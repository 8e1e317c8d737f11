"""Chooses the load format of each start, and remembers how long its weights took.

Rules this file keeps:
- `load_format` decides; here it is asked, and its memory kept in <state_dir>/load-formats.json;
- a start that failed with a format of our choice is tried again with another: it is never the
  spec's fault.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Collection

from msgspec import Struct

from agent.core.replica import launch_name
from agent.metrics import Metrics
from agent.weights import load_format_policy
from agent.weights.load_format_policy import DEFAULT, Choice, Known
from runtime.engine.vllm import arguments
from runtime.wire.agent_messages import DeviceKind, StartRung
from runtime.wire.model_spec import ModelSpec

log = logging.getLogger("stoker.agent")

KEPT_LAUNCHES = 256
_PROBE_TIMEOUT_S = 60.0
_PROBE = (
    "import importlib.util, sys\n"
    "print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name)))"
)


class _Start(Struct, frozen=True):
    launch: str
    choice: Choice
    rung: StartRung


class LoadFormats:
    """The load formats of one node. All methods are for the event loop's thread."""

    def __init__(
        self,
        kind: DeviceKind,
        known: dict[str, Known],
        save: Callable[[dict[str, Known]], None],
        metrics: Metrics,
    ) -> None:
        """`known`: as `save` was given it last, by `launch_name`."""
        self._kind = kind
        self._known = known
        self._save = save
        self._metrics = metrics
        self._starts: dict[str, _Start] = {}
        self.modules: tuple[str, ...] = ()  # that the engine's interpreter can import

    def choose(
        self, replica_id: str, spec: ModelSpec, files: Collection[str], rung: StartRung
    ) -> str | None:
        """The format to start with; None: the engine's own default, or the spec's.

        `files`: the names in the model's folder.
        """
        if spec.engine != "vllm":
            return None
        declared = arguments.flat_args(spec.engine_args).get("load_format")
        launch = launch_name(spec)
        formats = load_format_policy.usable(
            self._kind, self.modules, files, spec.tensor_parallel_size
        )
        known = self._known.get(launch, Known())
        choice = load_format_policy.choose(known, formats, rung, declared)
        self._starts[replica_id] = _Start(launch, choice, rung)
        self._keep(launch, load_format_policy.begun(known, choice))
        self._metrics.load_formats.labels(spec.name, choice.format or declared, choice.why).inc()
        log.info(
            "%s: load format %s (%s; usable here: %s)",
            replica_id,
            choice.format or declared,
            choice.why,
            ", ".join(formats),
        )
        return None if choice.format == DEFAULT else choice.format

    def measured(self, replica_id: str, took_s: float | None) -> None:
        """Learn how long its weights took; None: its log did not say."""
        start = self._starts.pop(replica_id, None)
        if start and start.choice.format and took_s is not None and start.rung != "remote":
            known = self._known.get(start.launch, Known())
            found = load_format_policy.measured(known, start.choice.format, start.rung, took_s)
            self._keep(start.launch, found)

    def failed(self, replica_id: str, words: str) -> bool:
        """Learn that it died while it started; whether a format that we chose may be why."""
        start = self._starts.pop(replica_id, None)
        if start is None or start.choice.format in (None, DEFAULT):
            return False
        log.warning("%s: load format %s is not used again", replica_id, start.choice.format)
        known = self._known.get(start.launch, Known())
        self._keep(start.launch, load_format_policy.failed(known, start.choice.format or "", words))
        return True

    def forget(self, replica_id: str) -> None:
        """Forget a start that is over."""
        self._starts.pop(replica_id, None)

    def _keep(self, launch: str, known: Known) -> None:
        if self._known.get(launch, Known()) == known:
            return
        self._known.pop(launch, None)
        self._known[launch] = known
        while len(self._known) > KEPT_LAUNCHES:
            del self._known[next(iter(self._known))]
        self._save(self._known)


def importable(python: str) -> tuple[str, ...]:
    """Which of the formats' modules that interpreter can import; nothing is imported. Blocks."""
    command = [python, "-c", _PROBE, *load_format_policy.MODULES.values()]
    try:
        # In "/", since `-c` puts the cwd first on sys.path.
        done = subprocess.run(
            command, cwd="/", capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("which load formats %s has can't be told: %s", python, error)
        return ()
    return tuple(done.stdout.split())
