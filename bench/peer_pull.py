"""What a pull from a peer costs: against `cp` of the same files on the same disk, in the same run.

    python bench/peer_pull.py [--quick] [--json]

Two nodes' caches run in processes of their own and talk over loopback: HTTP with ranges, every
file hashed on arrival and checked, hard-linked into a folder an engine can load. Neither side
waits for the disk (`cp` does not either); both read from the page cache. Rounds alternate.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.lib.report import Row, print_report

NODE = Path(__file__).parent / "lib" / "cache_node.py"
TOTAL_BYTES = 438_000_000
SETS = {"one file": 1, "4 files": 4}
TARGET = ">= 0.6"


@contextlib.contextmanager
def node(*args: str | Path) -> Iterator[Callable[[], str]]:
    """A cache process; the call sends it a line and returns its next one."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    argv = [sys.executable, str(NODE), *map(str, args)]
    child = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    assert child.stdin is not None
    assert child.stdout is not None
    stdin, stdout = child.stdin, child.stdout

    def ask() -> str:
        stdin.write("\n")
        stdin.flush()
        if not (line := stdout.readline()):
            raise SystemExit(f"the {args[0]} process ended")
        return line

    try:
        yield ask
    finally:
        stdin.close()
        child.wait(20)


def write_files(folder: Path, count: int) -> None:
    """`count` files of TOTAL_BYTES together, no two blocks alike."""
    folder.mkdir(parents=True)
    for number in range(count):
        with (folder / f"model-{number}.safetensors").open("wb") as out:
            left = TOTAL_BYTES // count
            while left:
                left -= out.write(os.urandom(min(left, 2**24)))


def copied_s(source: Path, target: Path) -> float:
    """How long `cp -r` takes."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    taken = time.perf_counter() - began
    shutil.rmtree(target)
    return taken


def checked_s(source: Path, target: Path) -> float:
    """How long `cp -r` and then hashing the copy take, one file after the other."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.iterdir():
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
    taken = time.perf_counter() - began
    shutil.rmtree(target)
    return taken


def measure(root: Path, count: int, rounds: int) -> tuple[float, float, float]:
    """Medians of (pull, cp, cp and a hash of the copy) in seconds."""
    model = root / "shared" / "bench" / "model"
    write_files(model, count)
    pulls, copies, checked = [], [], []
    with node("serve", root, root / "shared") as server:
        server()
        with node("pull", root) as pull:
            for _ in range(rounds + 1):
                copies.append(copied_s(model, root / "copy"))
                checked.append(checked_s(model, root / "copy"))
                pulls.append(float(pull()))
    medians = [statistics.median(taken[1:]) for taken in (pulls, copies, checked)]
    return medians[0], medians[1], medians[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="five rounds, under a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    rows = []
    for name, count in SETS.items():
        with tempfile.TemporaryDirectory(prefix="stoker-bench-") as folder:
            pull_s, copy_s, checked_copy_s = measure(
                Path(folder), count, 5 if options.quick else 15
            )
        ours = TOTAL_BYTES / 1e6 / pull_s
        metric = f"MB/s, peer pull, {name}"
        rows.append(Row(metric, ours, TOTAL_BYTES / 1e6 / copy_s, "cp", TARGET))
        rows.append(Row(metric, ours, TOTAL_BYTES / 1e6 / checked_copy_s, "cp, then hash"))
    print_report("peer_pull", rows, options.json)


if __name__ == "__main__":
    main()
