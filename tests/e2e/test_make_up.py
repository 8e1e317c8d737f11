"""What `make up EXIT=1` runs, with the real vLLM: the first promise of the README."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kits.checkout import ROOT

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),  # three cold starts, each up to two minutes on two cores
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: run `make setup`"
    ),
]


def test_the_demo_with_real_models(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "cli.main", "demo", "--engine", "vllm", "--exit", "--json"]
    argv += ["--port", "0", "--state-dir", str(tmp_path / "state")]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("STOKER_")}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=clean)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["problems"] == []
    rows = shown["rows"]
    *first, last = dict.fromkeys(row["model"] for row in rows)
    assert [(r["model"], r["what"]) for r in rows[:-1]] == [
        *((name, "cold start") for name in first),
        (first[0], "warm"),
    ]
    assert rows[-1]["model"] == last
    made_room = re.fullmatch(r"cold start, (?:evicted (.*)|put (.*) to sleep)", rows[-1]["what"])
    assert made_room, rows[-1]["what"]
    assert (made_room[1] or made_room[2]) in first
    assert all(r["tokens"] > 0 and r["engine"].startswith("vllm 0.") for r in rows)
    cold, warm = (
        next(r["first_token_s"] for r in rows if r["what"] == what)
        for what in ("cold start", "warm")
    )
    assert warm < cold
