"""`stoker model …`, `load`, `pin`, `logs`: what is sent, what is said, and when it fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from runtime.wire.agent_messages import MemoryEstimate, SpecProblem
from runtime.wire.model_spec import ModelSpec
from scheduler.admin import views
from tests.kits.checkout import ROOT
from tests.kits.cli_runner import SPEC, FakeServer, error, model, replica, serving, stoker


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving() as server:
        yield server


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "m.yaml"
    path.write_text("{name: m, source: /models/m, aliases: [org/m], device_memory_bytes: 12GiB}")
    return path


@pytest.fixture
def bad_file(tmp_path: Path) -> Path:
    path = tmp_path / "bad.yaml"
    path.write_text("- {name: 'a b', source: x}\n- {name: c, sourc: x, max_replicas: 0}")
    return path


# ------------------------------------------------------------------------------ add, check, rm


@pytest.mark.parametrize(
    ("warmth", "waiting", "words"),
    [
        ("starting", 0, "it is on its way: starting on n1"),
        ("starting", 3, "it is on its way: starting on n1"),
        ("cold", 3, "it waits: starting on n1"),
        ("cold", 0, "it can't run now: starting on n1"),
        ("failed", 0, "it can't run now: starting on n1"),
    ],
)
def test_add_says_what_its_problem_means(
    fake: FakeServer, spec_file: Path, warmth: str, waiting: int, words: str
) -> None:
    shown = model(warmth=warmth, waiting=waiting, problem="starting on n1")
    saved = views.Saved(created=True, model=shown, checked_against="", notes=())
    fake.replies["PUT /admin/models/m"] = (201, saved)
    done = stoker(fake, "model", "add", str(spec_file))
    assert words in done.output


def test_add_sends_the_spec_and_says_what_was_checked(fake: FakeServer, spec_file: Path) -> None:
    estimate = MemoryEstimate(
        weights_bytes=1, kv_bytes=1, overhead_bytes=1, total_bytes=3, explanation="1 + 1 + 1 = 3"
    )
    saved = views.Saved(
        created=True,
        model=model(estimate=estimate, problem="no node is up"),
        checked_against="vllm 0.32.0 argument parser",
        notes=("mind the gap",),
    )
    fake.replies["PUT /admin/models/m"] = (201, saved)
    done = stoker(fake, "model", "add", str(spec_file))
    assert done.exit_code == 0, done.output
    (body,) = fake.bodies("PUT /admin/models/m")
    assert msgspec.json.decode(body, type=ModelSpec) == SPEC
    for words in (
        "added m: 12.0 GiB a replica (declared)", "vllm 0.32.0 argument parser", "1 + 1 + 1 = 3",
        "it can't run now: no node is up", "mind the gap",
    ):  # fmt: skip
        assert words in done.output


def test_add_says_when_nothing_was_checked(fake: FakeServer, spec_file: Path) -> None:
    fake.replies["PUT /admin/models/m"] = views.Saved(created=False, model=model())
    done = stoker(fake, "model", "add", str(spec_file))
    assert "changed m" in done.output
    assert "checked against nothing" in done.output


def test_add_says_when_nothing_changed(fake: FakeServer, spec_file: Path) -> None:
    saved = views.Saved(created=False, changed=False, model=model())
    fake.replies["PUT /admin/models/m"] = saved
    assert stoker(fake, "model", "add", str(spec_file)).output.startswith("unchanged m: ")


def test_add_new_fails_where_the_name_is_taken(fake: FakeServer, spec_file: Path) -> None:
    fake.replies["POST /admin/models"] = (409, error("there is a model 'm' already"))
    done = stoker(fake, "model", "add", "--new", str(spec_file))
    assert done.exit_code == 1
    assert done.stderr == "Error: model m: there is a model 'm' already\n"


def test_add_prints_every_problem_of_the_scheduler(fake: FakeServer, spec_file: Path) -> None:
    problem = SpecProblem(
        field="engine_args.max_len",
        message="is unknown",
        value=3,
        fix="did you mean max_model_len?",
    )
    fake.replies["PUT /admin/models/m"] = (422, error("model m is refused", problems=(problem,)))
    done = stoker(fake, "model", "add", str(spec_file))
    assert done.exit_code == 1
    assert "engine_args.max_len: is unknown (got 3); did you mean max_model_len?" in done.stderr


def test_a_refused_model_is_named_once_with_each_problem_once(
    fake: FakeServer, spec_file: Path
) -> None:
    """What the scheduler sends: the problems in the message, and as fields."""
    problem = SpecProblem(field="engine_args.x", message="is unknown", value=3)
    fake.replies["PUT /admin/models/m"] = (422, error(str(problem), problems=(problem,)))
    done = stoker(fake, "model", "add", str(spec_file))
    assert done.stderr == "Error: model m: engine_args.x: is unknown (got 3)\n"
    fake.replies["GET /admin/models/n"] = (
        404, error("there is no model 'n'; did you mean 'm'?", close=("m",))
    )  # fmt: skip
    shown = stoker(fake, "model", "show", "n")
    assert shown.stderr == "Error: there is no model 'n'; did you mean 'm'?\n"


def test_a_file_with_a_mistake_adds_nothing_of_any_file(
    fake: FakeServer, spec_file: Path, bad_file: Path
) -> None:
    done = stoker(fake, "model", "add", str(spec_file), str(bad_file))
    assert done.exit_code == 1
    assert fake.asked == []
    for words in (str(bad_file), "a b.name", "c.sourc", "did you mean 'source'?", "c.max_replicas"):
        assert words in done.stderr


def test_check_needs_no_cluster(spec_file: Path, bad_file: Path) -> None:
    assert stoker(None, "model", "check", str(spec_file)).output.startswith("ok: m.")
    assert stoker(None, "model", "check", str(bad_file)).exit_code == 1
    twice = stoker(None, "model", "check", str(spec_file), str(spec_file))
    assert "is already a name of model 'm'" in twice.stderr
    assert "can't read" in stoker(None, "model", "check", "/no/such/file").stderr
    shown = stoker(None, "model", "check", "--json", str(spec_file)).output
    assert msgspec.json.decode(shown, type=list[ModelSpec]) == [SPEC]


def test_schema_is_a_json_schema() -> None:
    schema = json.loads(stoker(None, "model", "schema").output)
    assert schema["properties"]["source"]
    assert schema["$schema"].endswith("2020-12/schema")


def test_rm_removes_each(fake: FakeServer) -> None:
    fake.replies |= {"DELETE /admin/models/m": (200, b""), "DELETE /admin/models/n": (200, b"")}
    assert stoker(fake, "model", "rm", "m", "n").output == "removed m\nremoved n\n"


def test_an_alias_with_slashes_stays_one_part_of_the_path(fake: FakeServer) -> None:
    fake.replies["GET /admin/models/org%2Fm"] = model(problem="too large", pinned=True)
    output = stoker(fake, "model", "show", "org/m").output
    for words in ("m\n", "12.0 GiB a replica (declared)", "too large", "source: /models/m"):
        assert words in output


def test_ls(fake: FakeServer) -> None:
    listed = (model(memory_from="estimated", pinned=True), model(name="n", warmth="hot", ready=1))
    fake.replies["GET /admin/models"] = views.Models(models=listed)
    output = stoker(fake, "model", "ls").output
    assert "12.0 GiB est." in output
    assert "pinned" in output
    assert "hot" in output


# ------------------------------------------------------------------------------ load, pin


def test_load_waits_until_enough_replicas_are_ready(fake: FakeServer) -> None:
    fake.replies["POST /admin/models/m/load"] = model(warmth="starting", wanted=1, replicas=1)
    fake.replies["GET /admin/models/m"] = [
        model(warmth="starting", wanted=1, replicas=1),
        model(warmth="hot", wanted=1, replicas=1, ready=1),
    ]
    starting = replica(state="starting", reason="after evicting n")
    fake.replies["GET /admin/replicas"] = views.Replicas(replicas=(starting,))
    done = stoker(fake, "load", "m")
    assert done.exit_code == 0, done.output
    assert "m-1-1 starting on gpu-1 (after evicting n)" in done.stderr
    assert done.stdout == "m: 1 ready of 1 replicas, 1 wanted\n"
    assert fake.bodies("POST /admin/models/m/load") == [b'{"replicas":1}']


def test_load_does_not_wait_for_more_than_the_model_may_have(fake: FakeServer) -> None:
    fake.replies["POST /admin/models/m/load"] = model(warmth="hot", replicas=1, ready=1)
    assert stoker(fake, "load", "m", "--replicas", "5").exit_code == 0


@pytest.mark.parametrize(
    "stuck",
    [
        model(warmth="failed", problem="out of memory", replicas=1),
        model(warmth="cold", problem="out of memory"),
    ],
)
def test_load_fails_in_words(fake: FakeServer, stuck: views.ModelView) -> None:
    fake.replies["POST /admin/models/m/load"] = model(warmth="starting", replicas=1)
    fake.replies["GET /admin/models/m"] = stuck
    fake.replies["GET /admin/replicas"] = views.Replicas(replicas=())
    done = stoker(fake, "load", "m")
    assert done.exit_code == 1
    assert "m can't be started: out of memory" in done.stderr


def test_load_without_waiting(fake: FakeServer) -> None:
    fake.replies["POST /admin/models/m/load"] = model(warmth="starting", wanted=2)
    done = stoker(fake, "load", "m", "--no-wait", "--json")
    assert msgspec.json.decode(done.stdout, type=views.ModelView).wanted == 2
    assert len(fake.asked) == 1


def test_unload_and_pin(fake: FakeServer) -> None:
    fake.replies["POST /admin/models/m/unload"] = model(replicas=1)
    assert stoker(fake, "unload", "m").output == "m: 0 ready of 1 replicas, 0 wanted\n"
    fake.replies["POST /admin/models/m/pin"] = [model(pinned=True), model()]
    assert stoker(fake, "pin", "m").output == "m is pinned\n"
    assert stoker(fake, "unpin", "m").output == "m is not pinned\n"
    assert fake.bodies("POST /admin/models/m/pin") == [b'{"pinned":true}', b'{"pinned":false}']


# ------------------------------------------------------------------------------ logs


async def _text(request: web.Request) -> web.StreamResponse:
    return web.Response(text=f"first of {request.path.split('/')[3]}\nlast\n")


def test_logs_of_a_replica(fake: FakeServer) -> None:
    fake.replies["GET /admin/replicas"] = views.Replicas(replicas=(replica(),))
    fake.replies["GET /admin/replicas/m-1-1/logs"] = _text
    done = stoker(fake, "logs", "m-1-1", "-n", "7")
    assert done.output == "first of m-1-1\nlast\n"
    assert fake.asked[-1][0] == "GET /admin/replicas/m-1-1/logs?tail=7&follow=0"
    lines = stoker(fake, "logs", "m-1-1", "--json").output.splitlines()
    assert json.loads(lines[0]) == {"replica_id": "m-1-1", "line": "first of m-1-1"}


def test_logs_of_a_model_are_those_of_all_its_replicas(fake: FakeServer) -> None:
    both = (replica(), replica(replica_id="m-1-2"), replica(replica_id="n-1-1", model="n"))
    fake.replies["GET /admin/replicas"] = views.Replicas(replicas=both)
    fake.replies["GET /admin/models/org%2Fm"] = model()
    fake.replies["GET /admin/replicas/m-1-1/logs"] = _text
    fake.replies["GET /admin/replicas/m-1-2/logs"] = _text
    lines = stoker(fake, "logs", "org/m", "-f").output.splitlines()
    assert sorted(lines) == [
        "m-1-1 | first of m-1-1", "m-1-1 | last", "m-1-2 | first of m-1-2", "m-1-2 | last",
    ]  # fmt: skip
    assert fake.asked[-1][0].endswith("tail=100&follow=1")


def test_logs_of_a_cold_model_says_where_to_look(fake: FakeServer) -> None:
    fake.replies["GET /admin/replicas"] = views.Replicas(replicas=())
    fake.replies["GET /admin/models/m"] = model()
    done = stoker(fake, "logs", "m")
    assert done.exit_code == 1
    assert "`stoker decisions --model m`" in done.stderr


def test_logs_that_can_not_be_had(fake: FakeServer) -> None:
    fake.replies["GET /admin/replicas"] = views.Replicas(replicas=(replica(),))
    fake.replies["GET /admin/replicas/m-1-1/logs"] = (502, error("node gpu-1 does not answer"))
    done = stoker(fake, "logs", "m-1-1")
    assert done.exit_code == 1
    assert done.stderr == "Error: node gpu-1 does not answer\n"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")))
def test_the_examples_are_right(path: Path) -> None:
    done = stoker(None, "model", "check", str(path))
    assert done.exit_code == 0, done.output
