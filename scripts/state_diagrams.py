"""Writes the diagrams of docs/states.md from the transition tables: `make states`.

Each stands between `<!-- states: NAME -->` and `<!-- /states -->`; a test says when one is not
current.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from agent.core import replica as agent_replica
from scheduler.state import stages

PAGE = Path(__file__).parents[1] / "docs" / "states.md"
# name -> (the first state, state -> those that may follow it; None: forgotten)
Table = Mapping[Any, Collection[Any]]  # states are words, or of an enum of words


def without(table: Table, left_out: str) -> Table:
    """The table but for one state and what leads to it."""
    return {a: [b for b in to if b != left_out] for a, to in table.items() if a != left_out}


TABLES: Mapping[str, tuple[str, Table]] = {
    # Nearly every stage leads to `unknown` and back, which the page says in words.
    "scheduler": (stages.Stage.PLANNED, without(stages.EDGES, stages.Stage.UNKNOWN)),
    "agent": ("starting", agent_replica.EDGES),
}
_MARKED = re.compile(r"(?<=<!-- states: )(\w+) -->\n.*?(?=<!-- /states -->)", re.DOTALL)


def diagram(first: str, table: Table) -> str:
    """A table of transitions as a Mermaid state diagram, its states in the table's order."""
    order = list(table)
    lines = ["stateDiagram-v2", f"    [*] --> {first}"]
    for state, following in table.items():
        for other in sorted(filter(None, following), key=order.index):
            lines.append(f"    {state} --> {other}")
        if None in following:
            lines.append(f"    {state} --> [*]")
    return "\n".join(lines)


def current(page: str) -> str:
    """The page with each marked diagram as its table has it now."""

    def redrawn(found: re.Match[str]) -> str:
        name = found[1]
        return f"{name} -->\n\n```mermaid\n{diagram(*TABLES[name])}\n```\n\n"

    return _MARKED.sub(redrawn, page)


def main() -> None:
    """Bring docs/states.md up to date."""
    PAGE.write_text(current(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
