"""How long each phase of a start took, heard from the engine's log while it starts. Pure.

Rules this file keeps:
- a phase ends when the line that ends it is seen; the phases add up to the whole start;
- what vLLM says it compiled and captured is taken out of the phase it happened in;
- a line that is not known is nothing; a log without known lines leaves all of it to "other".
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# The phase that a line ends, in the order of a start. As vLLM 0.32 logs them.
_ENDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("import", re.compile(r"\(APIServer pid=")),
    ("init", re.compile(r"Starting to load model|Loading model from scratch")),
    ("weights", re.compile(r"Loading weights took|Model loading took")),
    ("kv", re.compile(r"init engine \(.*\) took [\d.]+ s")),
)
_COMPILED = re.compile(r"torch\.compile (?:and .*together )?took ([\d.]+) s in total")
_CAPTURED = re.compile(r"Graph capturing finished in ([\d.]+) secs")
_WARM_UP = re.compile(r"Warming up model for the compilation")  # on a CPU
_WARM = re.compile(r"Warming up done")


class StartLog:
    """Reads one start's log as it grows."""

    def __init__(self) -> None:
        self._ended: dict[str, float] = {}  # phase -> when
        self._inner: dict[str, float] = {}  # seconds of what happens inside of kv
        self._warm_up_at: float | None = None
        self._rest = ""

    def feed(self, text: str, now: float) -> None:
        """More of the log, seen now."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line, now)

    def _line(self, line: str, now: float) -> None:
        for phase, pattern in _ENDS:
            if pattern.search(line) and (phase not in self._ended or phase == "weights"):
                self._ended[phase] = now
        for phase, pattern in (("compile", _COMPILED), ("graphs", _CAPTURED)):
            if found := pattern.search(line):
                self._inner[phase] = self._inner.get(phase, 0.0) + float(found[1])
        if _WARM_UP.search(line):
            self._warm_up_at = now
        elif _WARM.search(line) and self._warm_up_at is not None:
            self._inner["compile"] = now - self._warm_up_at

    def phases(
        self,
        spawned_at: float,
        forked_at: float,
        ready_at: float,
        before: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Seconds of each phase: from Spawn, to the process being there, to its health check.

        `before`: those that came first, which are no part of the fork.
        """
        found = dict(before or {})
        found["fork"] = max(0.0, forked_at - spawned_at - sum(found.values()))
        last = forked_at
        for phase, _ in _ENDS:
            if phase in self._ended:
                end = max(last, min(self._ended[phase], ready_at))
                found[phase], last = end - last, end
        known = found.keys() & {phase for phase, _ in _ENDS}
        found["app" if known else "other"] = ready_at - last
        for phase, took_s in self._inner.items():
            found[phase] = min(took_s, found.get("kv", 0.0))
            found["kv"] = found.get("kv", 0.0) - found[phase]
        return {phase: round(took_s, 3) for phase, took_s in found.items() if took_s > 0.0005}
