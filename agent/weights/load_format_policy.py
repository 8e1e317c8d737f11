"""Which of vLLM's load formats a model's weights are read with on this host, by measurement. Pure.

    auto (safetensors), fastsafetensors, runai_streamer, sharded_state

Rules this file keeps:
- pure; `engine_args.load_format` wins, and is neither measured nor changed;
- what works is not risked for little: an alternative is tried only once the default was measured
  twice and takes WORTH_S or longer, and each of them once;
- like is compared with like: loads from the page cache with such, loads from the disk with such;
- after that the fastest median is used; one that failed a start is not used again, with the reason.

Worked example, from the disk: auto took 40 and 38 s, so fastsafetensors is tried: 12 s, then
runai_streamer: 20 s. fastsafetensors is used, until its median of 5 should be above auto's 39 s.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import median

from msgspec import Struct

from runtime.wire.agent_messages import DeviceKind

DEFAULT = "auto"
WORTH_S = 5.0
_MEASURED_FIRST = 2  # loads with the default, before another one is tried
_KEPT = 5  # the last measurements of each

# format -> the module that vLLM needs for it
MODULES: Mapping[str, str] = {
    "fastsafetensors": "fastsafetensors",
    "runai_streamer": "runai_model_streamer",
}


class Known(Struct, frozen=True, kw_only=True):
    """What was measured of one launch on this host."""

    seconds: dict[str, tuple[float, ...]] = {}  # "auto/cached" -> the last loads, newest last
    failed: dict[str, str] = {}  # format -> why it is not used any more
    tried: tuple[str, ...] = ()  # alternatives that were chosen once, measured or not


class Choice(Struct, frozen=True):
    """`format` None: the spec says it itself. `why`: override, default, trial or fastest."""

    format: str | None
    why: str


def usable(
    kind: DeviceKind, modules: Collection[str], files: Collection[str], tensor_parallel_size: int
) -> tuple[str, ...]:
    """The formats that can work, the default first.

    `modules`: that the engine's interpreter can import; `files`: names in the model's folder.
    """
    plain = any(f.endswith(".safetensors") and not f.startswith("model-rank-") for f in files)
    found = [DEFAULT]
    if plain and kind == "nvml" and MODULES["fastsafetensors"] in modules:
        found.append("fastsafetensors")  # vLLM's loader knows CUDA devices only
    if plain and kind != "simulated" and MODULES["runai_streamer"] in modules:
        found.append("runai_streamer")
    ranks = range(tensor_parallel_size)
    if tensor_parallel_size > 1 and all(_shard(rank) in files for rank in ranks):
        found.append("sharded_state")
    return tuple(found)


def choose(known: Known, formats: Sequence[str], rung: str, declared: object) -> Choice:
    """The format of the next start from `rung`; `declared` is the spec's own, None: none."""
    if declared is not None:
        return Choice(None, "override")
    default = known.seconds.get(f"{DEFAULT}/{rung}", ())
    if len(default) < _MEASURED_FIRST or median(default) < WORTH_S:
        return Choice(DEFAULT, "default")
    others = [f for f in formats if f != DEFAULT and f not in known.failed]
    if new := next((f for f in others if f not in known.tried), None):
        return Choice(new, "trial")
    medians = {f: median(s) for f in others if (s := known.seconds.get(f"{f}/{rung}"))}
    best = min(medians, key=lambda f: medians[f], default=DEFAULT)
    if best != DEFAULT and medians[best] < median(default):
        return Choice(best, "fastest")
    return Choice(DEFAULT, "fastest")


def begun(known: Known, choice: Choice) -> Known:
    """A start with it was made."""
    if choice.why != "trial" or choice.format is None:
        return known
    return Known(seconds=known.seconds, failed=known.failed, tried=(*known.tried, choice.format))


def measured(known: Known, format: str, rung: str, took_s: float) -> Known:
    """The weights of a start were loaded."""
    key = f"{format}/{rung}"
    last = (*known.seconds.get(key, ()), round(took_s, 3))[-_KEPT:]
    return Known(seconds={**known.seconds, key: last}, failed=known.failed, tried=known.tried)


def failed(known: Known, format: str, words: str) -> Known:
    """A start with that alternative did not come up."""
    return Known(seconds=known.seconds, failed={**known.failed, format: words}, tried=known.tried)


def _shard(rank: int) -> str:
    return f"model-rank-{rank}-part-0.safetensors"
