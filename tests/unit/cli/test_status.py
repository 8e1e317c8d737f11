"""The commands that show something: tables for people, the API's exact JSON for programs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator

import click
import msgspec
import pytest

from cli.client import Admin, AdminError, open_admin
from cli.main import COMMANDS
from cli.main import stoker as group
from cli.text import age, size
from scheduler.admin import views
from tests.kits.cli_runner import (
    GIB,
    TOKEN,
    FakeServer,
    device,
    error,
    node,
    replica,
    serving,
    stoker,
)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving() as server:
        yield server


@pytest.mark.parametrize(
    ("count", "shown"),
    [(None, "-"), (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (12 * GIB, "12.0 GiB")],
)
def test_size(count: int | None, shown: str) -> None:
    assert size(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"), (0.04, "0.0s"), (9.94, "9.9s"), (10.4, "10s"), (59.4, "59s"), (59.6, "1m 0s"),
        (190, "3m 10s"), (7500, "2h 5m"), (200000, "2d 7h"),
    ],
)  # fmt: skip
def test_age(seconds: float | None, shown: str) -> None:
    assert age(seconds) == shown


@pytest.mark.parametrize("name", COMMANDS)
def test_help_line_is_the_commands_own(name: str) -> None:
    command = group.get_command(click.Context(group), name)
    assert command is not None
    assert command.get_short_help_str(limit=200).rstrip(".") == COMMANDS[name][1].rstrip(".")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json(name: str) -> None:
    command = group.get_command(click.Context(group), name)
    commands = command.commands.values() if isinstance(command, click.Group) else [command]
    for each in commands:
        assert each is not None
        assert any("--json" in p.opts for p in each.params), f"{name} {each.name}"


def test_help_imports_nothing_slow() -> None:
    code = (
        "import sys\nfrom cli.main import stoker\n"
        "try: stoker(['--help'])\nexcept SystemExit: pass\n"
        "slow = {'aiohttp', 'rich', 'msgspec', 'yaml', 'runtime.wire.routes'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Ask MODEL one thing" in done.stdout


def test_ps(fake: FakeServer) -> None:
    fake.replies["GET /admin/replicas"] = views.Replicas(
        replicas=(replica(), replica(replica_id="m-1-2", state="starting", reason="best fit"))
    )
    shown = stoker(fake, "ps")
    assert shown.exit_code == 0, shown.output
    first = next(line for line in shown.output.splitlines() if "m-1-1" in line)
    for cell in ("m ", "gpu-1", "GPU-aa, GPU-bb", "12.0 GiB", "ready", "3m 10s", "4.2s"):
        assert cell in first
    assert "best fit" in shown.output


def test_ps_marks_the_stub_restarts_and_an_older_spec(fake: FakeServer) -> None:
    odd = replica(engine="stub", restarts=2, outdated=True)
    fake.replies["GET /admin/replicas"] = views.Replicas(replicas=(odd,))
    assert "stub engine; 2 restarts; has an older spec" in stoker(fake, "ps").output


def test_ps_shows_what_a_sleeper_holds(fake: FakeServer) -> None:
    sleeper = replica(
        state="asleep",
        sleep_level=1,
        residue_bytes=GIB,
        wake_s=1.5,
        disabled={"asleep-2": "gibberish"},
    )
    fake.replies["GET /admin/replicas"] = views.Replicas(replicas=(sleeper,))
    output = stoker(fake, "ps").output
    for cell in ("asleep, level 1", "2.0 GiB", "1.5s", "no asleep-2 any more: gibberish"):
        assert cell in output


def test_ps_json_is_the_apis_bytes(fake: FakeServer) -> None:
    body = b'{"replicas":[],  "a field of a later version": 1}'
    fake.replies["GET /admin/replicas"] = body
    assert stoker(fake, "ps", "--json").output.encode() == body + b"\n"


def test_nodes(fake: FakeServer) -> None:
    fake.replies["GET /admin/nodes"] = views.Nodes(nodes=(node(state="cordoned"),))
    output = stoker(fake, "nodes").output
    for cell in (
        "cordoned",
        "0.4s ago",
        "12.0 GiB",
        "160.0 GiB",
        "500.0 GiB",
        "3.0 GiB of 256.0 GiB",
        "vllm 0.32.0",
    ):
        assert cell in output


def test_devices(fake: FakeServer) -> None:
    fake.replies["GET /admin/devices"] = views.Devices(devices=(device(),))
    output = stoker(fake, "devices").output
    for cell in ("H200", "80.0 GiB", "6.0 GiB", "74.0 GiB", "7.0 GiB", "25%", "41 °C", "m-1-1"):
        assert cell in output


def test_queue(fake: FakeServer) -> None:
    waiting = views.QueueView(
        model="m", waiting=3, in_flight=0, oldest_wait_s=12, waiting_for="starting on gpu-1"
    )
    fake.replies["GET /admin/queue"] = views.Queue(queue=(waiting,))
    output = stoker(fake, "queue").output
    assert "12s" in output
    assert "starting on gpu-1" in output


def test_decisions_come_oldest_first_and_are_asked_for_by_limit_and_model(fake: FakeServer) -> None:
    def decided(number: int, action: str) -> views.DecisionView:
        return views.DecisionView(
            number=number, age_s=1, action=action, model="m", replica_id="m-1-1",
            node_id="gpu-1", reason="makes room for n", cause="1 request waiting",
        )  # fmt: skip

    both = (decided(2, "evict"), decided(1, "start"))
    fake.replies["GET /admin/decisions"] = views.Decisions(decisions=both)
    output = stoker(fake, "decisions", "-n", "5", "--model", "m").output
    assert output.index("start") < output.index("evict")
    assert fake.asked[-1][0] == "GET /admin/decisions?limit=5&model=m"


@pytest.mark.parametrize("kind", ["replicas", "nodes", "devices", "queue", "decisions", "models"])
def test_nothing_to_show_is_said_in_words(fake: FakeServer, kind: str) -> None:
    fake.replies[f"GET /admin/{kind}"] = msgspec.json.encode({kind: []})
    args = {"replicas": ["ps"], "models": ["model", "ls"]}.get(kind, [kind])
    shown = stoker(fake, *args)
    assert shown.exit_code == 0
    assert shown.output.startswith(("no", "nothing"))


def test_drain_says_what_is_left(fake: FakeServer) -> None:
    fake.replies["POST /admin/nodes/gpu-1/drain"] = node(state="draining", replicas=2)
    assert stoker(fake, "drain", "gpu-1").output == "gpu-1 is draining; 2 replicas left on it\n"
    fake.replies["POST /admin/nodes/gpu-1/uncordon"] = node()
    assert stoker(fake, "uncordon", "gpu-1").output == "gpu-1 takes replicas\n"


# ------------------------------------------------------------------------------ refusals


def test_an_unknown_node_is_an_error_on_stderr(fake: FakeServer) -> None:
    body = error("there is no node 'gpu-7'", close=("gpu-1",))
    fake.replies["POST /admin/nodes/gpu-7/cordon"] = (404, body)
    done = stoker(fake, "cordon", "gpu-7")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr == "Error: there is no node 'gpu-7'\n  did you mean gpu-1?\n"


def refused(*, missing: bool = False) -> dict[str, object]:
    return {"node_id": "n", "error": "no", "missing": missing}


BAD = {"model": "foo", "revision": "main", "checked_bytes": 1, "bad_files": ["w"]}
FREED = {"node_id": "m", "freed_bytes": 1}


@pytest.mark.parametrize(
    ("call", "command", "nodes", "status"),
    [
        ("POST /admin/cache/pull", "pull", [refused()], 1),
        ("POST /admin/cache/pull", "pull", [], 1),
        ("DELETE /admin/cache", "rm", [refused()], 1),
        ("DELETE /admin/cache", "rm", [refused(), FREED], 1),
        ("DELETE /admin/cache", "rm", [refused(missing=True)], 1),
        ("DELETE /admin/cache", "rm", [refused(missing=True), FREED], 0),
        ("POST /admin/cache/verify", "verify", [refused()], 1),
        ("POST /admin/cache/verify", "verify", [{"node_id": "m", "report": BAD}], 1),
    ],
)
def test_what_a_cache_did_not_do_is_no_success(
    fake: FakeServer, call: str, command: str, nodes: list[object], status: int
) -> None:
    fake.replies[call] = msgspec.json.encode({"nodes": nodes})
    done = stoker(fake, "cache", command, "foo")
    assert (done.exit_code, done.stderr) == (status, "")


def test_a_wrong_token(fake: FakeServer) -> None:
    done = stoker(None, "--admin", fake.url, "--token", "wrong", "ps")
    assert done.exit_code == 1
    assert "the token is missing or wrong" in done.stderr


def test_nobody_listens() -> None:
    done = stoker(None, "--admin", "http://127.0.0.1:9", "--token", "x", "ps")
    assert done.exit_code == 1
    assert "can't reach the scheduler at http://127.0.0.1:9" in done.stderr


def test_something_else_answers(fake: FakeServer) -> None:
    fake.replies["GET /admin/replicas"] = b"<html>hello</html>"
    done = stoker(fake, "ps")
    assert done.exit_code == 1
    assert "something else than the admin API" in done.stderr
    fake.replies["GET /admin/replicas"] = (502, b"bad gateway")
    assert "status 502: bad gateway" in stoker(fake, "ps").stderr


def test_a_scheduler_that_does_not_lead_names_the_one_that_does(fake: FakeServer) -> None:
    with serving() as leader:
        leader.replies["GET /admin/replicas"] = views.Replicas(replicas=(replica(),))
        body = error("this scheduler is not the leader", leader=leader.url)
        fake.replies["GET /admin/replicas"] = (503, body)
        done = stoker(fake, "ps")
    assert "m-1-1" in done.output
    assert done.exit_code == 0


async def test_a_leader_of_the_past_is_not_clung_to(fake: FakeServer) -> None:
    past = error("this scheduler is not the leader", leader="http://127.0.0.1:9")
    now = views.Replicas(replicas=(replica(),))
    fake.replies["GET /admin/replicas"] = [(503, past), (200, now)]
    async with open_admin(fake.url, TOKEN) as admin:
        with pytest.raises(AdminError, match=r"can't reach the scheduler at http://127\.0\.0\.1:9"):
            await admin.replicas()
        assert (await admin.replicas()).value == now


@pytest.mark.parametrize(
    ("limit", "ask", "advice"),
    [
        ("_READ_S", Admin.replicas, False),
        ("_CHANGE_S", lambda admin: admin.load("m", 1), True),
    ],
)
async def test_a_scheduler_that_takes_its_time_is_not_called_unreachable(
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    ask: Callable[[Admin], Awaitable[object]],
    advice: bool,
) -> None:
    monkeypatch.setattr(f"cli.client.{limit}", 0.2)
    held: list[asyncio.StreamWriter] = []

    async def say_nothing(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with open_admin(f"http://127.0.0.1:{port}", TOKEN) as admin:
            with pytest.raises(AdminError, match=r"took the call, but .* in 0\.2 s") as caught:
                await ask(admin)
        for writer in held:
            writer.close()
    assert ("look before you ask again" in caught.value.message) == advice


def test_nobody_leads(fake: FakeServer) -> None:
    fake.replies["GET /admin/replicas"] = (503, error("no scheduler leads yet"))
    done = stoker(fake, "ps")
    assert done.exit_code == 1
    assert done.stderr == "Error: no scheduler leads yet\n"


def test_a_usage_error_has_status_2(fake: FakeServer) -> None:
    done = stoker(fake, "decisions", "-n", "none")
    assert done.exit_code == 2
    assert "'none' is not a valid integer" in done.stderr
    assert stoker(fake, "nonsense").exit_code == 2


def test_no_traceback_for_what_nobody_thought_of() -> None:
    code = (
        "import sys, cli.main as m\n"
        "def ps(**_): raise KeyError('gone')\n"
        "import cli.status; cli.status.ps.callback = ps\n"
        "sys.argv = ['stoker', 'ps']; m.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "Error: KeyError: 'gone' (STOKER_DEBUG=1 shows where)\n"


@pytest.mark.parametrize(
    ("command", "path", "answer", "words"),
    [
        ("decisions", "decisions", views.Decisions(decisions=()), "nothing decided about 'q' yet"),
        ("coldstarts", "coldstarts", views.ColdStarts(cold_starts=()), "no cold starts of 'q' "),
    ],
)
def test_nothing_of_one_model_does_not_read_as_nothing_at_all(
    fake: FakeServer, command: str, path: str, answer: object, words: str
) -> None:
    fake.replies[f"GET /admin/{path}"] = answer
    assert words in stoker(fake, command, "--model", "q").output
