"""A part's log stays bounded while the part has it open."""

from __future__ import annotations

from pathlib import Path

from cli.log_files import KEPT, bound, start_new

LIMIT = 10_000


def test_a_log_never_grows_beyond_what_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "router.log"
    with path.open("ab", buffering=0) as part:  # as a child has it
        for number in range(10_000):
            part.write(b"line %06d\n" % number)
            if number % 100 == 0:
                bound(path, LIMIT)
        part.write(b"the last\n")
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert len(sizes) == 1 + KEPT
    assert max(sizes) <= LIMIT + 100 * 12
    assert path.read_bytes().endswith(b"the last\n")
    assert b"\0" not in path.read_bytes()  # appended after the cut, not after a hole
    kept = (tmp_path / "router.log.1").read_text() + path.read_text()
    numbers = [int(line.split()[1]) for line in kept.splitlines()[:-1]]
    assert numbers == list(range(numbers[0], 10_000))  # no line between them is lost


def test_a_small_or_missing_log_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "router.log"
    assert not bound(path, LIMIT)
    path.write_text("few\n")
    assert not bound(path, LIMIT)
    assert path.read_text() == "few\n"


def test_the_last_runs_log_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "router.log"
    for text in ("first", "second", "third", "fourth"):
        start_new(path).write_text(text)
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {
        "router.log": "fourth", "router.log.1": "third", "router.log.2": "second",
    }  # fmt: skip
