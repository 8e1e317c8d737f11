"""Policies on many workloads, cell by cell into a file: resumable, on several cores.

A cell is one policy on one workload with one seed of the simulation; its line of JSON has the
figures of bench/lib/policy_runs.py. Cells are run seed by seed, so that a table of all workloads
is there after the first seed and only becomes steadier.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from bench.lib.policy_runs import POLICIES, Cluster, Contender, run
from bench.policies import family, special
from scheduler.core.turn import Settings

ROOT = Path(__file__).parents[2]
CONTENDERS = POLICIES | {"ours": Contender()}  # by default ours is what production's default is
SPEC = "spec."  # of a key that is a field of the models' specs, not of Settings


class Mistake(Exception):
    """Something asked for that can't be run; it is told without a traceback."""


@dataclass(frozen=True)
class Variant:
    """A policy under the name that the table gives it."""

    label: str
    policy: str  # of CONTENDERS
    settings: dict[str, Any] = field(default_factory=dict)  # keys with SPEC: of the models' specs

    def contender(self) -> Contender:
        """What runs."""
        base = CONTENDERS[self.policy]
        spec = {k.removeprefix(SPEC): v for k, v in self.settings.items() if k.startswith(SPEC)}
        own = {k: v for k, v in self.settings.items() if not k.startswith(SPEC)}
        return replace(base, spec=base.spec | spec, settings=base.settings | own)


@dataclass(frozen=True)
class Cell:
    """One run."""

    workload: str
    variant: Variant
    seed: int
    world: dict[str, Any] = field(default_factory=dict)  # settings of every policy's core

    @property
    def key(self) -> tuple[str, str, int]:
        """What it is known by in a file."""
        return self.workload, self.variant.label, self.seed

    @property
    def settings(self) -> dict[str, Any]:
        """All that differs from the defaults."""
        return self.world | self.variant.settings


# ------------------------------------------------------------------------------- what is asked for


def variants(policies: str, ours: str | None, more: list[str]) -> list[Variant]:
    """The contenders of a command line. `ours`: KEY=VALUE,...; `more`: LABEL:KEY=VALUE,..."""
    known = {k for k in CONTENDERS if k != "dedicated"}  # it has a cluster of its own
    names = [name for name in policies.split(",") if name]
    if wrong := [name for name in names if name not in known]:
        raise Mistake(f"there is no policy {wrong[0]!r}; use {', '.join(sorted(known))}")
    own = parse_settings(ours or "")
    found = [Variant(name, name, own if name == "ours" else {}) for name in names]
    for one in more:
        label, colon, given = one.partition(":")
        if not colon or not label:
            raise Mistake(f"{one!r} is not LABEL:KEY=VALUE,...")
        found.append(Variant(label, "ours", own | parse_settings(given)))
    labels = [one.label for one in found]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise Mistake(f"two policies are called {twice[0]!r}: give one another label")
    return found


def parse_settings(text: str) -> dict[str, Any]:
    """KEY=VALUE,...: fields of Settings, or with SPEC of the models' specs."""
    known = {f.name for f in fields(Settings)}
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or (key not in known and not key.startswith(SPEC)):
            fix = f"use KEY=VALUE with a key of {', '.join(sorted(known))}, or {SPEC}FIELD"
            raise Mistake(f"{part!r} is not a setting of this tree; {fix}")
        found[key] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def check_name(name: str) -> None:
    """Raise Mistake where there is no workload of that name."""
    if not _is_seed(name) and name not in special.NAMES:
        raise Mistake(f"there is no workload {name!r}; use fSEED or {', '.join(special.NAMES)}")


def _is_seed(name: str) -> bool:
    return name[:1] == "f" and name[1:].isdigit()


def cells(
    workloads: list[str], variants: list[Variant], runs: int, world: dict[str, Any]
) -> list[Cell]:
    """Every workload by every variant, for the first seed first."""
    return [
        Cell(name, variant, seed, world)
        for seed in range(1, runs + 1)
        for name in workloads
        for variant in variants
    ]


# ------------------------------------------------------------------------------- running


@lru_cache(maxsize=64)
def drawn(name: str) -> family.Drawn:
    """A workload by name: f201 is the family's of seed 201, others are special.py's."""
    return family.draw(int(name[1:])) if _is_seed(name) else special.drawn(name)


def run_cell(cell: Cell) -> dict[str, Any]:
    """Simulate it: its line."""
    began = time.process_time()
    one = drawn(cell.workload)
    cluster = Cluster(one.case.gpus, one.node_gpus, one.host_gib, one.on_disk, one.architectures)
    found = run(
        one.case, cell.variant.label, cell.variant.contender(), cluster, cell.seed, cell.world
    )
    line = asdict(found) | {
        "workload": cell.workload, "seed": cell.seed, "settings": cell.settings,
        "unanswered": found.requests - found.answered, "traits": one.traits,
        "cpu_s": time.process_time() - began,
    }  # fmt: skip
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}


def run_all(
    wanted: list[Cell], out: Path, jobs: int, run_one: Callable[[Cell], dict[str, Any]] = run_cell
) -> None:
    """Run what `out` does not have yet, and add it there."""
    there = {(c["workload"], c["policy"], c["seed"]): c for c in read(out)}
    for cell in wanted:
        known = there.get(cell.key)
        if known is not None and known["settings"] != cell.settings:
            raise Mistake(
                f"{out} has {cell.variant.label} with settings {known['settings']}, not"
                f" {cell.settings}: give it another label, or write to another file"
            )
    left = [cell for cell in wanted if cell.key not in there]
    tree = described_tree()
    if others := {c["tree"] for c in there.values()} - {tree}:
        print(f"note: {out} has cells of {', '.join(sorted(others))}; now {tree}", file=sys.stderr)
    with out.open("a") as file:
        if file.tell() and not out.read_bytes().endswith(b"\n"):
            file.write("\n")  # an earlier run was ended in the middle of a line
        for line in _finished(left, jobs, run_one):
            file.write(json.dumps(line | {"tree": tree}) + "\n")
            file.flush()


def _finished(
    left: list[Cell], jobs: int, run_one: Callable[[Cell], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The lines, as they come, with progress on stderr."""
    began = time.monotonic()
    with ProcessPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_one, cell) for cell in left]
        try:
            for count, future in enumerate(as_completed(futures), 1):
                line = future.result()
                left_s = (time.monotonic() - began) / count * (len(left) - count)
                print(_progress(line, count, len(left), left_s), file=sys.stderr, flush=True)
                yield line
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _progress(line: dict[str, Any], count: int, total: int, left_s: float) -> str:
    return (
        f"[{count}/{total}, {left_s / 60:.0f} min left] {line['workload']} {line['policy']}"
        f" #{line['seed']}: mean {line['mean_s']:.2f} p99 {line['p99_s']:.1f} unanswered"
        f" {line['unanswered']}, {line['cpu_s']:.1f} s of CPU"
    )


def read(path: Path) -> list[dict[str, Any]]:
    """The cells of a file; a line that was cut off is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def described_tree() -> str:
    """The commit that runs, with a + where the tree has changes that are not committed."""
    argv = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=10", "--dirty=+"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
