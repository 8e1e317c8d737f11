"""A running cluster leaves nothing that another user of its host could read."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import requests

from tests.kits.cluster import running


def test_nothing_in_the_state_dir_is_for_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with running(tmp_path / "state", "--devices", "simulated:1x24GiB") as cluster:
            spec = tmp_path / "m.yaml"
            spec.write_text("name: m\nsource: none\nengine: stub\ndevice_memory_bytes: 1GiB\n")
            cluster.stoker("model", "add", str(spec))
            body: dict[str, Any] = {"model": "m", "prompt": "secret words", "max_tokens": 1}
            url, headers = f"{cluster.router}/v1/completions", {"Prefer": "respond-async"}
            assert requests.post(url, json=body, timeout=60).status_code == 200
            job = requests.post(
                f"{cluster.router}/invoke/m", json=body, headers=headers, timeout=60
            )
            assert job.status_code == 202, job.text
            found = [p for p in (tmp_path / "state").rglob("*") if not p.is_symlink()]
            names = {p.relative_to(tmp_path / "state").as_posix() for p in found}
            assert {"jobs.db", "registry.db", "up.json", "logs", "replicas"} <= names, names
            assert any(n.startswith("replicas/") for n in names)
            assert any(n.startswith("logs/m-") for n in names)
            open_to_others = [
                f"{p} {oct(stat.S_IMODE(p.lstat().st_mode))}"
                for p in [tmp_path / "state", *found]
                if p.lstat().st_mode & 0o077
            ]
            assert open_to_others == []
    finally:
        os.umask(before)
