"""LoRA adapters through a whole cluster: real processes, the stub engine, real adapter folders."""

from __future__ import annotations

import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.kits.cluster import alive, running, wait_until
from tests.kits.lora_adapter import write_adapter

QUICK = {"start_s": 0.0, "ttft_s": 0.0, "token_s": 0.0, "sleep_s": 0.0, "wake_2_s": 0.0}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    state = tmp_path_factory.mktemp("adapters") / "state"
    with running(state, "--devices", "simulated:1x200GiB") as one:
        yield one


@pytest.fixture
def folders(tmp_path):
    return {name: str(write_adapter(tmp_path / name)) for name in ("sql", "chat", "late")}


def declare(cluster, name, adapters, **engine_args):
    spec = {
        "name": name, "source": "/stub", "engine": "stub", "device_memory_bytes": "8GiB",
        "adapters": adapters, "engine_args": QUICK | engine_args,
    }  # fmt: skip
    return cluster.admin("PUT", f"/admin/models/{name}", spec)


def label(cluster, model, timeout=30):
    """Which weights the engine says have answered."""
    answer = cluster.complete(model, timeout=timeout)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return answer.json()["system_fingerprint"]


def loaded(cluster, model):
    """The adapters that the model's one engine holds, by its own word."""
    (replica,) = cluster.replicas(model)
    (file,) = cluster.state_dir.rglob(f"replicas/{replica['replica_id']}.json")
    record = json.loads(file.read_text())
    key = {"Authorization": f"Bearer {record['route_key']}"}
    url = f"http://127.0.0.1:{record['port']}/v1/models"
    cards = requests.get(url, headers=key, timeout=10).json()["data"]
    return sorted(card["id"] for card in cards if card.get("parent"))


def answers_or_says_when(cluster, model):
    """Whether it was answered; if not, it must have been told when to come back."""
    answer = cluster.complete(model)
    if answer.status_code == 503:
        assert answer.headers["Retry-After"] == "5", answer.text
        return False
    assert (answer.status_code, answer.json()["model"]) == (200, model), answer.text
    return True


def alone(cluster, model, before):
    """The model's one replica, once that is another than `before`."""
    now = cluster.replicas(model)
    return now[0] if len(now) == 1 and now[0]["pid"] not in (None, before["pid"]) else None


def test_adapters_are_models_by_name(cluster, folders):
    declare(cluster, "m", {"sql": folders["sql"], "chat": folders["chat"]})
    assert label(cluster, "m:sql") == "stoker-stub+m:sql", "asked for first, it starts the base"
    assert label(cluster, "m") == "stoker-stub"
    assert label(cluster, "m:chat") == "stoker-stub+m:chat"
    assert loaded(cluster, "m") == ["m:chat", "m:sql"]
    (replica,) = cluster.replicas("m")

    listed = requests.get(f"{cluster.router}/v1/models", timeout=10).json()["data"]
    cards = {card["id"]: card for card in listed}
    assert cards["m:sql"]["parent"] == "m"
    assert cards["m:sql"]["warmth"] == "hot"
    assert cards["m"]["parent"] is None
    one = requests.get(f"{cluster.router}/v1/models/m:chat", timeout=10).json()
    assert one == cards["m:chat"]
    assert cluster.complete("m:nope").status_code == 404

    invoked = requests.post(
        f"{cluster.router}/invoke/m:sql", json={"prompt": "one", "max_tokens": 1}, timeout=10
    )
    assert invoked.json()["model"] == "m:sql"
    assert [r["pid"] for r in cluster.replicas("m")] == [replica["pid"]]


def test_one_is_added_and_removed_while_its_engine_runs(cluster, folders):
    declare(cluster, "live", {"sql": folders["sql"]})
    assert label(cluster, "live:sql") == "stoker-stub+live:sql"
    (before,) = cluster.replicas("live")
    assert cluster.complete("live:late").status_code == 404

    declare(cluster, "live", {"sql": folders["sql"], "late": folders["late"]})
    assert label(cluster, "live:late") == "stoker-stub+live:late", "at once: the engine waits"

    declare(cluster, "live", {"late": folders["late"]})
    gone = cluster.complete("live:sql")
    assert gone.status_code == 404
    assert "live:late" in gone.json()["error"]["message"], "close names are offered"
    wait_until(lambda: loaded(cluster, "live") == ["live:late"], "live:sql unloaded")
    (after,) = cluster.replicas("live")
    assert (after["replica_id"], after["pid"]) == (before["replica_id"], before["pid"])


def test_another_folder_takes_the_place_of_the_first(cluster, folders):
    declare(cluster, "swap", {"a": folders["sql"]})
    label(cluster, "swap:a")
    declare(cluster, "swap", {"a": folders["chat"]})
    wait_until(lambda: loaded(cluster, "swap") == [], "the first one unloaded")
    assert label(cluster, "swap:a") == "stoker-stub+swap:a"


def test_they_are_there_again_after_the_engine_and_the_agent_died(cluster, folders):
    declare(cluster, "tough", {"sql": folders["sql"]})
    label(cluster, "tough:sql")
    declare(cluster, "tough", {"sql": folders["sql"], "late": folders["late"]})
    label(cluster, "tough:late")
    (replica,) = cluster.replicas("tough")
    os.kill(replica["pid"], signal.SIGKILL)
    wait_until(lambda: not alive(replica["pid"]), "the engine gone")
    assert label(cluster, "tough:late") == "stoker-stub+tough:late"
    assert label(cluster, "tough:sql") == "stoker-stub+tough:sql"
    (again,) = cluster.replicas("tough")
    assert (again["replica_id"], again["pid"] != replica["pid"]) == (replica["replica_id"], True)

    cluster.kill_part("agent")
    wait_until(lambda: cluster.try_admin("/admin/replicas"), "the scheduler")
    assert label(cluster, "tough:late") == "stoker-stub+tough:late"
    declare(cluster, "tough", {"sql": folders["sql"]})
    wait_until(lambda: loaded(cluster, "tough") == ["tough:sql"], "tough:late unloaded")
    (kept,) = cluster.replicas("tough")
    assert kept["pid"] == again["pid"]


def test_none_is_answered_with_not_found_while_its_files_are_missing(cluster, folders):
    declare(cluster, "slow", {"sql": folders["sql"], "late": folders["late"]})
    shutil.rmtree(folders["late"])
    assert label(cluster, "slow:sql") == "stoker-stub+slow:sql"
    answer = cluster.complete("slow:late")
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "5"
    assert "not a folder on this node" in answer.json()["error"]["message"]


def test_room_for_a_higher_rank_restarts_the_engine_and_drops_no_adapter(
    cluster, folders, tmp_path
):
    declare(cluster, "rank", {"sql": folders["sql"]})
    label(cluster, "rank:sql")
    (before,) = cluster.replicas("rank")
    wide = str(write_adapter(tmp_path / "wide", rank=40))
    declare(cluster, "rank", {"sql": folders["sql"], "wide": wide})
    assert label(cluster, "rank:sql") == "stoker-stub+rank:sql"
    wait_until(lambda: answers_or_says_when(cluster, "rank:wide"), "rank:wide")
    after = wait_until(lambda: alone(cluster, "rank", before), "the narrow engine gone")
    declare(cluster, "rank", {"sql": folders["sql"]})
    assert label(cluster, "rank:sql") == "stoker-stub+rank:sql"
    assert [r["pid"] for r in cluster.replicas("rank")] == [after["pid"]]


def test_the_first_adapter_of_a_busy_base_is_served_by_its_successor(cluster, folders):
    declare(cluster, "first", {}, token_s=0.05)
    label(cluster, "first")
    (before,) = cluster.replicas("first")
    with ThreadPoolExecutor() as pool:  # so that the old engine is not replaced at once
        long = pool.submit(cluster.complete, "first", 60)
        wait_until(lambda: cluster.replicas("first")[0]["in_flight"], "it to be busy")
        declare(cluster, "first", {"sql": folders["sql"]}, token_s=0.05)
        wait_until(lambda: answers_or_says_when(cluster, "first:sql"), "first:sql")
        assert long.result().status_code == 200
    wait_until(lambda: alone(cluster, "first", before), "the old engine gone")


@pytest.mark.parametrize(
    ("made", "declared", "words"),
    [
        ({"rank": 64}, {"max_lora_rank": 16}, "rank 64, more than engine_args.max_lora_rank, 16"),
        ({"rank": 1000, "hidden": 4, "kv": 4}, {}, "rank 1000, more than what vLLM offers"),
        ({"peft_type": "IA3"}, {}, "peft_type 'IA3', not LORA"),
        ({"use_dora": True}, {}, "use_dora, which vLLM does not serve"),
    ],
)
def test_what_can_not_be_served_is_refused_by_name(cluster, tmp_path, made, declared, words):
    folder = str(write_adapter(tmp_path / "bad", **made))
    with pytest.raises(AssertionError, match=r"422 .*adapters\.bad") as refused:
        declare(cluster, "refused", {"bad": folder}, **declared)
    assert words in str(refused.value)
    assert cluster.try_admin("/admin/models/refused") is None


def test_a_missing_source_and_a_taken_name_are_refused(cluster, folders):
    with pytest.raises(AssertionError, match=r"422 .*adapters\.x.*is not a folder on this node"):
        declare(cluster, "missing", {"x": "/no/such/adapter"})
    cluster.add_stub("taken", aliases=["clash:sql"])
    with pytest.raises(AssertionError, match=r"409 .*adapters.*clash:sql.*model 'taken'"):
        declare(cluster, "clash", {"sql": folders["sql"]})
