"""One way from a word of somebody else's to a file, a URL or a key."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yarl

from runtime.places import MAX_NAME_BYTES, Outside, below, checked, inside, key, open_inside, url

STEPS = [
    "..", ".", "", "/", "/etc", "a/../b", "a/..", "../a", "a//b", "a/", "./a", "a\0b", "a\nb",
    "..\\a", "x" * (MAX_NAME_BYTES + 1), "\udcff/..", "a/\x7f",
]  # fmt: skip


@pytest.mark.parametrize("word", STEPS)
def test_a_path_that_is_no_plain_one_below_is_refused(tmp_path: Path, word: str) -> None:
    with pytest.raises(Outside):
        below(tmp_path, word)
    with pytest.raises(Outside):
        inside(tmp_path, "a", word)
    with pytest.raises(Outside):
        open_inside(tmp_path, word)


@pytest.mark.parametrize("word", ["a", "org/name", "a..b", "...", "name@v1.0", "ä ö", "-x", "~"])
def test_a_plain_path_is_joined_as_it_is(tmp_path: Path, word: str) -> None:
    assert below(tmp_path, word, "f") == tmp_path / word / "f"
    assert inside(tmp_path, word, "f") == tmp_path / word / "f"


def test_a_link_out_of_the_root_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    (root / "a").mkdir(parents=True)
    out.mkdir()
    (out / "secret").write_text("s")
    (root / "folder").symlink_to(out)
    (root / "a" / "file").symlink_to("../../out/secret")
    (root / "chain").symlink_to("folder")
    for words in (("folder", "secret"), ("a", "file"), ("a/file",), ("chain/secret",), ("folder",)):
        with pytest.raises(Outside, match="leads out of"):
            inside(root, *words)
        with pytest.raises(Outside, match="leads out of"):
            open_inside(root, *words)


def test_a_link_that_stays_inside_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "b1").write_text("weights")
    (tmp_path / "m").symlink_to("blobs/b1")
    assert inside(tmp_path, "m").read_text() == "weights"
    with os.fdopen(open_inside(tmp_path, "m")) as file:
        assert file.read() == "weights"


def test_a_root_that_is_a_link_itself_is_a_root(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "f").write_text("x")
    (tmp_path / "root").symlink_to("real")
    assert inside(tmp_path / "root", "f") == tmp_path / "root" / "f"
    os.close(open_inside(tmp_path / "root", "f"))


def test_what_is_not_there_yet_has_a_path(tmp_path: Path) -> None:
    assert inside(tmp_path, "new", "file.json") == tmp_path / "new" / "file.json"
    with pytest.raises(FileNotFoundError):
        open_inside(tmp_path, "new")


def test_a_fifo_does_not_block_whoever_opens_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.close(open_inside(tmp_path, "pipe"))


@pytest.mark.parametrize(
    "word", ["../../agent/cache?x=", "a/b", "a?b", "a#b", "a%2Fb", "a b", "ä", "..a", "a;b", "@h"]
)
def test_a_segment_stays_one_segment_for_the_client_too(word: str) -> None:
    made = yarl.URL(url("http://agent:1", "agent", "replicas", word, "logs", encoded=1))
    assert made.parts == ("/", "agent", "replicas", word, "logs")
    assert (made.host, made.query_string, made.fragment) == ("agent", "encoded=1", "")


@pytest.mark.parametrize("word", ["..", ".", "", "a\nb", "a\0", "a\r\nHost: x"])
def test_a_segment_that_a_client_would_resolve_is_refused(word: str) -> None:
    with pytest.raises(Outside):
        url("http://agent:1", "agent", word)
    with pytest.raises(Outside):
        key("stoker", "tokens", word)


def test_a_query_is_quoted() -> None:
    assert url("http://h:1/", "a", q="x&y=z", n=3) == "http://h:1/a?q=x%26y%3Dz&n=3"
    assert url("", "agent", "blobs") == "/agent/blobs"


def test_a_key_has_one_level_a_segment() -> None:
    assert key("stoker/eu", "quarantine", "n1", "GPU-1:0") == "stoker/eu/quarantine/n1/GPU-1:0"
    with pytest.raises(Outside):
        key("stoker", "tokens", "../../x")


def test_a_pattern_holds_for_the_whole_word() -> None:
    pattern = re.compile("[a-z]+")
    assert checked(pattern, "abc", "the id") == "abc"
    for word in ("abc\n", "ab/c", "", "abc def"):
        with pytest.raises(Outside, match="the id"):
            checked(pattern, word, "the id")
