"""Who stands above whom: a file imports from its own room and from floors below it, never up, and
no files import each other in a circle. Imports for types alone and within functions count too.
`make house` (scripts/house.py) prints the figures of it.

A room is a folder of a part, or a file that stands in the part itself.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from scripts import house as house_figures
from scripts.house import arrows, circles, figures, room, work_tree
from tests.unit.rules.product import PARTS, sources, text

# folder -> its floors, the highest first; rooms of one floor don't know each other.
HOUSES: Mapping[str, str] = {
    "runtime": """
        router
        engine  registry  sim
        contract
        checkpoints
        wire  answers  leftovers  logs  notify  private  sockets
        bearer  outside  places  sizes
    """,
    "runtime/router": """
        driver
        observability
        front
        jobs  control
        proxy
        observe
        callers
        call
        admission
    """,
    "runtime/router/jobs": """
        service
        handlers
        batches  invokes  webhooks
        send  validate  metrics  signing
        plan  lines
        store
    """,
    "agent": """
        driver
        server
        node
        heartbeats
        lifecycle
        host
        records  rung_limits
        weights
        engines
        cache  devices  sim
        core
        address  link  metrics  tasks
    """,
    "scheduler": """
        main
        admin
        leadership
        route_book  stored_state
        driver  sim
        agent_calls  learned_state  access  audit
        core
        policy
        state
        signals  store  errors  usage  tasks
    """,
}


def floors(house: str) -> dict[str, int]:
    """Each room's floor, counted from the top."""
    lines = [line.split() for line in HOUSES[house].strip().splitlines()]
    return {room: number for number, rooms in enumerate(lines) for room in rooms}


def arrows_up(house: str, files: Mapping[str, str]) -> list[str]:
    """Every import that breaks the order of the floors, in words."""
    order = floors(house)
    found = []
    for path, others in arrows(files).items():
        here = room(house, path)
        for other in sorted(others):
            there = room(house, other)
            if here != there and order[here] >= order[there]:
                found.append(f"{path} imports {other}: {there} is not below {here}")
    return found


def in_circles(files: Mapping[str, str]) -> set[str]:
    """The files that import themselves, by way of others."""
    return set().union(*circles(arrows(files)))


def files_of(house: str) -> dict[str, str]:
    """path -> source, but for the folder's own `__init__`."""
    return {path: text(path) for path in sources(house, but=f"{house}/__init__.py")}


@pytest.mark.parametrize("house", HOUSES)
def test_no_import_goes_up(house: str) -> None:
    assert arrows_up(house, files_of(house)) == []


@pytest.mark.parametrize("part", ["agent", "cli", "runtime", "scheduler"])
def test_no_circle(part: str) -> None:
    assert in_circles(files_of(part)) == set()


@pytest.mark.parametrize("house", HOUSES)
def test_the_table_has_every_room_and_no_other(house: str) -> None:
    assert {room(house, path) for path in files_of(house)} == set(floors(house))


@pytest.mark.parametrize("part", ["agent", "runtime", "scheduler"])
def test_a_folder_says_what_lives_in_it_and_is_not_crowded(part: str) -> None:
    folders: dict[str, set[str]] = {}  # what lies in each
    for path in files_of(part):
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, set()).add(name)
        above, _, name = folder.rpartition("/")
        folders.setdefault(above, set()).add(name)
    for folder in folders.keys() - {part, ""}:
        inside = folders[folder]
        assert "__init__.py" in inside, f"{folder} has no __init__.py"
        opening = ast.get_docstring(ast.parse(text(f"{folder}/__init__.py")))
        assert opening, f"{folder}/__init__.py says nothing"
        assert 3 <= len(inside) - 1 <= 13, f"{folder} has {len(inside) - 1} files and folders"


PLANTED = {
    "agent/driver.py": "from agent.node import Node",
    "agent/node.py": "from agent.core.replica import Replica\nimport agent.metrics",
    "agent/metrics.py": "",
    "agent/core/messages.py": "",
    "agent/core/replica.py": "from agent.core import messages",
}


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("agent/core/replica.py", "import agent.node"),
        ("agent/metrics.py", "def f():\n    from agent.core import replica"),
        ("agent/core/messages.py", "if TYPE_CHECKING:\n    from agent.driver import run"),
        ("agent/node.py", "from agent import driver"),
    ],
)
def test_a_planted_arrow_up_is_found(path: str, line: str) -> None:
    assert arrows_up("agent", PLANTED) == []
    assert arrows_up("agent", PLANTED | {path: line})


def test_a_planted_circle_is_found() -> None:
    assert in_circles(PLANTED) == set()
    closed = PLANTED | {"agent/core/messages.py": "from agent.core import replica"}
    assert in_circles(closed) == {"agent/core/messages.py", "agent/core/replica.py"}


def test_the_figures_of_make_house_count_what_is_planted() -> None:
    longer = PLANTED | {"agent/node.py": "\n" * 9 + "def f():\n" + "    a = 1\n" * 40}
    assert figures("agent", PLANTED).arrows == 3
    assert figures("agent", longer).arrows == 1
    assert (figures("agent", longer).longest, figures("agent", longer).longest_lines) == (
        "node.py",
        50,
    )
    assert figures("agent", longer).long_functions == 1
    for figure in (figures("agent", PLANTED), figures("agent", longer)):
        assert (figure.folders, figure.files, figure.rooms) == (2, 5, 4)
        assert (figure.arrows_up, figure.circles) == (0, 0)

    closed = PLANTED | {"agent/core/messages.py": "from agent import node\nimport agent.driver"}
    assert figures("agent", closed).arrows_up == 1, "driver, node and core: one has to go"
    assert (figures("agent", closed).circles, figures("agent", closed).files_in_circles) == (1, 4)


def test_make_house_sees_every_file_of_the_product() -> None:
    assert set(work_tree()) == set(sources(*PARTS))


def test_make_house_reads_an_earlier_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent/node.py").write_text("a = 1\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "agent/node.py").write_text("a = 2\n")
    monkeypatch.setattr(house_figures, "ROOT", tmp_path)
    assert house_figures.at_revision("HEAD") == {"agent/node.py": "a = 1\n"}
    assert house_figures.work_tree() == {"agent/node.py": "a = 2\n"}
    with pytest.raises(subprocess.CalledProcessError):
        house_figures.at_revision("no-such-commit")
