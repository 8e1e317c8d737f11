"""What to read into the page cache, what to let go, and where a start begins from. Pure.

Rules this file keeps:
- pure: it gets figures, and answers with figures;
- never more of a model than was booked for it;
- a kernel that drops what is read is not fought: the pauses grow.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from msgspec import Struct

from runtime.wire.agent_messages import StartRung

STAGED_SHARE = 0.9  # so much of its weights in the page cache, and a start is from `staged`
CHECK_S = 5.0
LONGEST_PAUSE_S = 300.0


class WeightFile(Struct, frozen=True):
    """One file of a model's weights. `inode` tells hard links of one file."""

    path: str
    size_bytes: int
    inode: int = 0
    resident_bytes: int = 0


class Seen(Struct, frozen=True):
    """A model's folder as it was last looked at."""

    disk_bytes: int = 0
    files: tuple[WeightFile, ...] = ()

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights files."""
        return sum(f.size_bytes for f in self.files)

    @property
    def resident_bytes(self) -> int:
        """Bytes of them that are in the page cache."""
        return sum(f.resident_bytes for f in self.files)


def to_read(files: Iterable[WeightFile], limit_bytes: int) -> list[tuple[str, int]]:
    """(path, bytes from its beginning) to have in the page cache, in the order of loading.

    10 and 20 bytes with a limit of 15: all of the first, 5 of the second.
    """
    reads, left = [], limit_bytes
    for file in files:
        part = min(file.size_bytes, left)
        if part > 0:
            reads.append((file.path, part))
        left -= part
    return reads


def to_drop(
    held: Mapping[str, tuple[WeightFile, ...]],
    wished: Collection[str],
    used: Collection[int],
    loading: Collection[str],
) -> dict[str, list[str]]:
    """source -> the paths of it to let go, of models that are held and no longer wished for.

    Not those that a wished model shares (`inode`), that an engine of ours has mapped (`used`), or
    whose model is being loaded (`loading`): they stay held, and are asked about again.
    """
    kept = {f.inode for source in wished for f in held.get(source, ())} | set(used)
    return {
        source: [f.path for f in files if f.inode not in kept]
        for source, files in held.items()
        if source not in wished
        and source not in loading
        and not any(f.inode in used for f in files)
    }


def pause_s(dropped_rounds: int) -> float:
    """Until the next look, after so many rounds in a row that found pages dropped.

    0: 5 s, 1: 10 s, 2: 20 s … at most 300 s.
    """
    return float(min(CHECK_S * 2 ** min(dropped_rounds, 10), LONGEST_PAUSE_S))


def start_rung(on_disk: bool, seen: Seen) -> StartRung:
    """Where a start of that model begins. One without weight files is `cached` at best."""
    if not on_disk:
        return "remote"
    whole = seen.weights_bytes
    return "staged" if whole and seen.resident_bytes >= STAGED_SHARE * whole else "cached"
