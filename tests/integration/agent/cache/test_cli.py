"""`stoker cache` against real agents: a model of a shared store is fetched, checked and removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kits.cluster import Cluster, running, wait_until


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shared"
    (folder / "acme" / "tiny").mkdir(parents=True)
    (folder / "acme" / "tiny" / "config.json").write_text("{}")
    (folder / "acme" / "tiny" / "model.safetensors").write_bytes(b"w" * 3_000_000)
    monkeypatch.setenv("STOKER_CACHE_SHARED_DIR", str(folder))
    return folder


def models(cluster: Cluster) -> list[str]:
    (node,) = json.loads(cluster.stoker("cache", "ls", "--json"))["nodes"]
    assert node["error"] is None
    return [model["model"] for model in node["cache"]["models"]]


def test_pull_list_verify_and_remove(tmp_path: Path, shared: Path) -> None:
    with running(tmp_path / "state", "--devices", "simulated:1x24GiB") as cluster:
        assert "no models are cached" in cluster.stoker("cache", "ls")
        cluster.stoker("cache", "pull", "hf:acme/tiny")
        wait_until(lambda: models(cluster), "the model is cached")
        assert "has it already" in cluster.stoker("cache", "pull", "hf:acme/tiny")
        assert "cached" in cluster.stoker("cache", "ls")
        assert "all good" in cluster.stoker("cache", "verify", "hf:acme/tiny")
        (node,) = cluster.admin("GET", "/admin/cache")["nodes"]
        weights = Path(node["cache"]["models"][0]["path"]) / "model.safetensors"
        assert weights.read_bytes() == b"w" * 3_000_000
        assert "freed 2.9 MiB" in cluster.stoker("cache", "rm", "hf:acme/tiny")
        assert models(cluster) == []
        assert "is not in this node's cache" in cluster.stoker(
            "cache", "verify", "hf:acme/tiny", status=1
        )


def test_a_model_nobody_has_is_an_error_in_words(tmp_path: Path, shared: Path) -> None:
    with running(tmp_path / "state", "--devices", "simulated:1x24GiB") as cluster:
        assert "names no model" in cluster.stoker("cache", "pull", "s3://bucket", status=1)
        (node,) = cluster.admin("GET", "/admin/cache")["nodes"]
        assert node["cache"]["used_bytes"] == 0
