"""Overwriting what /proc shows of a process, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.kits.checkout import ROOT


def run(code: str, padding: int = 4096, *args: str) -> Any:
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OLD": "1", "PAD": "-" * padding}
    head = "import json, os, sys\nfrom runtime.engine import process_image as image\n"
    done = subprocess.run(
        [sys.executable, "-c", head + code, *args], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_environment_is_replaced_everywhere() -> None:
    seen = run(
        "image.replace_environment({'NEW': 'wert=ü', 'EMPTY': ''})\n"
        "raw = open('/proc/self/environ', 'rb').read().decode().rstrip('\\0').split('\\0')\n"
        "import subprocess\n"
        "child = subprocess.run(['/usr/bin/env'], capture_output=True, text=True).stdout\n"
        "print(json.dumps([raw, dict(os.environ), child.split()]))"
    )
    assert seen == [
        ["NEW=wert=ü", "EMPTY="],
        {"NEW": "wert=ü", "EMPTY": ""},
        ["NEW=wert=ü", "EMPTY="],
    ]


def test_an_environment_that_does_not_fit_changes_nothing() -> None:
    seen = run(
        "try:\n    image.replace_environment({'NEW': 'x' * 9000})\n"
        "except OSError as error:\n    print(json.dumps([str(error), os.environ['OLD']]))"
    )
    assert "9005 bytes does not fit" in seen[0]
    assert seen[1] == "1"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [(["short", "title"], "short title"), (["x" * 9000], None)],
)
def test_the_title_is_shown_and_cut_to_the_room(shown: list[str], expected: str | None) -> None:
    code = (
        f"image.set_title({shown!r})\n"
        "import psutil\nprint(json.dumps(' '.join(psutil.Process().cmdline()).strip()))"
    )
    title = run(code, 10, "-" * 300)
    assert title == expected if expected else set(title) == {"x"}
