"""Each tenant has a window of its own in every queue: a queue that is not known here fails.

What can hold work of several tenants is found by how it is made: by the constructors below, and by
SQL that reads rows which wait. Each place is listed with why one tenant can't fill it for another.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.unit.rules.product import sources, text

QUEUES = frozenset(
    {
        "deque", "Queue", "LifoQueue", "PriorityQueue", "SimpleQueue", "Semaphore",
        "BoundedSemaphore", "heappush", "FairQueue", "Plan",
    }
)  # fmt: skip

# file: what it makes, and why that is fair. "tenants": a window, a turn or a cap of each tenant.
KNOWN = {
    "runtime/router/admission/fairness.py": "tenants: lanes by tenant; a heap of deadlines",
    "runtime/router/admission/decisions.py": "tenants: FairQueue",
    "runtime/router/jobs/plan.py": "tenants: lanes by tenant, which take turns",
    "runtime/router/jobs/batches.py": "tenants: Plan; validation by Turns",
    "runtime/router/jobs/invokes.py": "tenants: Plan",
    "runtime/router/jobs/webhooks.py": "tenants: turns of each tenant before the common ones",
    "runtime/router/observe/access_log.py": "no work: lines for the disk",
    "runtime/router/proxy/upstream.py": "no work: idle connections to engines",
    "scheduler/audit.py": "no work of tenants: entries of the trail",
    "scheduler/agent_calls.py": "no work of tenants: commands for a node",
    "scheduler/state/cluster.py": "no work: what was decided",
    "scheduler/signals/windows.py": "no work: what was decided",
    "scheduler/admin/what_if.py": "no queue: a view",
    "scheduler/admin/view_builders.py": "no queue: a view",
}
# Where rows that wait are read: `oldest_of_each`, and one row or one tenant's by name.
_WAITS = re.compile(r"FROM (jobs|batches|hooks)\b|FROM \{table\}", re.IGNORECASE)
_ONE = re.compile(r"WHERE (id|seq) = \?|tenant = (\?|:tenant)|min\(tenant\)|DELETE FROM")
_NOT_WAITING = re.compile(r"ended_at IS NOT NULL|ended_at \+ keep_s|expires_at <|status = 'cancell")
_INPUTS = re.compile(r"SELECT (input|id) FROM batches")  # which files are still read


def made(tree: ast.AST) -> set[str]:
    """The queues that a module makes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            while isinstance(called, ast.Subscript):
                called = called.value
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            found |= {name} & QUEUES
        if isinstance(node, ast.keyword) and node.arg == "default_factory":
            found |= {getattr(node.value, "id", "")} & QUEUES
    return found


def texts(tree: ast.AST) -> Iterator[str]:
    """Strings, with what is filled into f-strings by its name."""
    inner = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield ast.unparse(node)[2:-1]
        elif isinstance(node, ast.Constant) and id(node) not in inner:
            yield str(node.value)


def unfair(tree: ast.AST) -> list[str]:
    """Reads of waiting rows that no tenant's window limits."""
    return [
        text
        for text in texts(tree)
        if text.startswith("SELECT") and _WAITS.search(text)
        and not _ONE.search(text) and not _NOT_WAITING.search(text) and not _INPUTS.search(text)
    ]  # fmt: skip


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sources("runtime/router", "scheduler"):
        if not path.startswith("scheduler/sim/"):
            yield path, ast.parse(text(path))


def test_every_queue_is_one_of_the_fair_ones() -> None:
    strange = {name: made(tree) for name, tree in modules() if made(tree) and name not in KNOWN}
    assert not strange, "a queue of several tenants needs a window for each: see jobs/tenants.py"


def test_what_is_listed_is_there() -> None:
    queues = {name for name, tree in modules() if made(tree)}
    assert not set(KNOWN) - queues, "no queue any more: take it off the list"


def test_rows_that_wait_are_read_by_windows_of_tenants() -> None:
    found = {name: unfair(tree) for name, tree in modules() if unfair(tree)}
    assert not found, "read queues in the store by jobs/tenants.py's oldest_of_each"


def test_a_planted_violation_is_found() -> None:
    planted = ast.parse(
        "def unfinished(db):\n"
        "    return db.execute('SELECT seq FROM jobs WHERE ended_at IS NULL ORDER BY seq')\n"
        "waiting = asyncio.Queue()\n"
        "@dataclass\nclass X:\n    lane: deque = field(default_factory=deque)\n"
    )
    assert made(planted) == {"Queue", "deque"}
    assert len(unfair(planted)) == 1
