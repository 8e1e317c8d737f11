"""A real `stoker up` on simulated devices with the stub engine, driven by the real CLI."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kits.checkout import ROOT
from tests.kits.cluster import Cluster, alive, running, wait_until

MODELS = """
models:
  - {name: a, source: none, engine: stub, device_memory_bytes: 10GiB, aliases: [org/a], priority: 1}
  - {name: b, source: none, engine: stub, device_memory_bytes: 10GiB}
  - {name: c, source: none, engine: stub, device_memory_bytes: 10GiB}
  - {name: slow, source: none, engine: stub, device_memory_bytes: 1GiB, engine_args: {token_s: 1}}
"""


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "cli.main", *args]


def environment(state_dir: Path) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("STOKER_")}
    return clean | {"STOKER_STATE_DIR": str(state_dir)}


def stoker(state_dir: Path, *args: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run one command against the `stoker up` of a state dir."""
    done = subprocess.run(
        command(*args), env=environment(state_dir), capture_output=True, text=True, cwd=ROOT,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == status, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def replicas(state_dir: Path) -> dict[str, dict[str, Any]]:
    """model -> its ready replica, as `stoker ps --json` has it."""
    found = json.loads(stoker(state_dir, "ps", "--json").stdout)["replicas"]
    return {r["model"]: r for r in found if r["state"] == "ready"}


@pytest.fixture
def models_file(tmp_path: Path) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text(MODELS)
    return path


@pytest.fixture
def up(tmp_path: Path, models_file: Path) -> Iterator[Cluster]:
    """One device of 24 GiB: two of a, b, c fit."""
    with running(
        tmp_path / "state", "--devices", "simulated:1x24GiB", "--models", str(models_file)
    ) as cluster:
        yield cluster


def test_models_come_go_and_survive_a_restart(tmp_path: Path, models_file: Path) -> None:
    state = tmp_path / "state"
    with running(state, "--devices", "simulated:1x24GiB"):
        assert stoker(state, "model", "ls").stdout.startswith("no models")
        assert "added a" in stoker(state, "model", "add", str(models_file)).stdout
        answer = stoker(state, "invoke", "org/a", "one two", "--max-tokens", "2")
        assert answer.stdout == "one two\n"
        assert "waiting for" in answer.stderr
        assert "waiting for" not in stoker(state, "invoke", "a", "x", "--max-tokens", "1").stderr
        assert stoker(state, "load", "b").stdout.startswith("b: 1 ready")
        a = replicas(state)["a"]
        assert a["engine"] == "stub"
        assert "stoker starts" in stoker(state, "logs", "a").stdout
        assert stoker(state, "logs", a["replica_id"]).stdout == stoker(state, "logs", "a").stdout
        assert stoker(state, "model", "rm", "slow").stdout == "removed slow\n"
        stoker(state, "model", "show", "slow", status=1)
        stoker(state, "pin", "b")
    assert not (state / "up.json").exists()
    assert "no cluster found" in stoker(state, "ps", status=1).stderr
    with running(state, "--devices", "simulated:1x24GiB"):
        listed = json.loads(stoker(state, "model", "ls", "--json").stdout)["models"]
        assert {m["name"]: m["pinned"] for m in listed} == {"a": False, "b": True, "c": False}
        assert stoker(state, "invoke", "c", "again", "--max-tokens", "1").stdout == "again\n"


def test_the_model_of_least_priority_makes_room(up: Cluster) -> None:
    state = up.state_dir
    stoker(state, "invoke", "b", "x")
    stoker(state, "invoke", "a", "x")
    stoker(state, "invoke", "c", "x")
    assert set(replicas(state)) == {"a", "c"}
    assert "makes room for c" in stoker(state, "decisions", "--model", "b").stdout


def test_a_part_that_dies_comes_back_where_it_was(up: Cluster) -> None:
    before = up.up
    for name in ("scheduler", "router", "agent"):
        up.kill_part(name)
    wait_until(lambda: up.try_admin("/admin/nodes"), "the scheduler answers again")
    notices = (up.state_dir.parent / "state.up.log").read_text()
    for name in ("scheduler", "router", "agent"):
        assert f"the {name} ended with signal 9" in notices
    assert stoker(up.state_dir, "invoke", "a", "back", "--max-tokens", "1").stdout == "back\n"
    assert up.up == before


def stream_slowly(up: Cluster, tokens: int) -> subprocess.Popen[str]:
    """A call of `tokens` seconds that has begun to answer."""
    call = subprocess.Popen(
        command("invoke", "slow", "w " * tokens, "--max-tokens", str(tokens)),
        env=environment(up.state_dir), stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert call.stdout is not None
    assert call.stdout.read(1) == "w"
    return call


def test_ctrl_c_lets_a_call_under_way_end(up: Cluster) -> None:
    call = stream_slowly(up, 3)
    up.process.send_signal(signal.SIGINT)
    rest, _ = call.communicate(timeout=60)
    assert (rest.split(), call.returncode) == (["w", "w"], 0)
    assert up.process.wait(60) == 0
    assert up.processes() == []


def test_a_second_ctrl_c_hurries(up: Cluster) -> None:
    call = stream_slowly(up, 600)
    engine = replicas(up.state_dir)["slow"]["pid"]
    up.process.send_signal(signal.SIGINT)
    log = up.state_dir / "logs" / "agent.log"
    wait_until(lambda: "draining 1 replicas" in log.read_text(), "the agent drains")
    assert alive(engine)
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(60) == 0
    assert up.processes() == []
    call.communicate(timeout=60)
    assert call.returncode == 1


def test_an_up_that_is_killed_leaves_nothing(up: Cluster) -> None:
    stoker(up.state_dir, "load", "a")
    assert len(up.processes()) >= 4
    up.process.kill()
    up.process.wait(10)
    wait_until(lambda: up.processes() == [], "the parts and the engine end by themselves")


def test_engines_of_a_killed_agent_end_too(up: Cluster) -> None:
    stoker(up.state_dir, "load", "a")
    engine = replicas(up.state_dir)["a"]["pid"]
    up.part("agent").kill()
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(60) == 0
    assert not alive(engine)
    assert up.processes() == []


# ------------------------------------------------------------------------------ refusals


def test_a_taken_port_is_named_and_nothing_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = stoker(tmp_path / "state", "up", "--port", port, status=1)
    assert f"127.0.0.1:{port}" in done.stderr
    assert "--port" in done.stderr


def test_devices_that_can_not_be_are_refused_in_the_agents_words(tmp_path: Path) -> None:
    done = stoker(tmp_path, "up", "--port", "0", "--devices", "simulated:many", status=1)
    assert "the agent ended with status 1" in done.stderr
    assert "simulated:many" in done.stderr


def test_two_ups_do_not_share_a_state_dir(up: Cluster) -> None:
    done = stoker(up.state_dir, "up", "--port", "0", status=1)
    assert "runs already" in done.stderr
    assert stoker(up.state_dir, "nodes").returncode == 0


# ------------------------------------------------------------------------------ the demo


def test_the_demo_shows_a_cold_start_a_warm_call_and_an_eviction(tmp_path: Path) -> None:
    args = ("demo", "--engine", "stub", "--exit", "--port", "0", "--json")
    done = stoker(tmp_path / "state", *args)
    shown = json.loads(done.stdout)
    assert shown["problems"] == []
    assert [(r["model"], r["what"]) for r in shown["rows"][:3]] == [
        ("tiny-a", "cold start"),
        ("tiny-b", "cold start"),
        ("tiny-a", "warm"),
    ]
    assert shown["rows"][3]["model"] == "tiny-c"
    assert re.fullmatch(
        r"cold start, (evicted tiny-[ab]|put tiny-[ab] to sleep)", shown["rows"][3]["what"]
    )
    assert all(r["tokens"] > 0 and r["reply"] for r in shown["rows"])


# ------------------------------------------------------------------------------ what is not there


def test_a_consul_that_is_not_there_is_named_within_seconds(tmp_path: Path) -> None:
    began = time.monotonic()
    done = stoker(
        tmp_path / "state", "up", "--port", "0", "--consul", "http://127.0.0.1:9", status=1
    )
    assert time.monotonic() - began < 30  # it was 60 s of silence
    assert "no Consul at http://127.0.0.1:9" in done.stderr
    assert "--consul" in done.stderr


def test_a_consul_that_says_nothing_is_named_too(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = stoker(tmp_path / "state", "up", "--port", "0", "--consul", url, status=1)
    assert f"no Consul at {url}: no answer within 5 s" in done.stderr
