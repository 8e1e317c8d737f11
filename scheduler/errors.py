"""Why the scheduler does not do what an operator asks for; admin/http.py makes answers of it.

Rule this file keeps: an error names the thing, its value and what to do.
"""

from __future__ import annotations

from typing import Any

from runtime.contract.schema import close_names
from runtime.wire.agent_messages import SpecProblem


class ChangeRefused(Exception):
    """A change that is not made. `problems`: each wrong field; `close`: names that may be meant."""

    def __init__(
        self, message: str, problems: tuple[SpecProblem, ...] = (), close: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.problems = problems
        self.close = close


class NotFound(ChangeRefused):
    """A name that is not known."""


class Conflict(ChangeRefused):
    """A change that would be right at another time: something that is there now is in its way."""


class Invalid(ChangeRefused):
    """A change that can't be right."""


def unknown(kind: str, name: str, known: list[str]) -> NotFound:
    """There is no `kind` of that name; those like it are named."""
    close = tuple(close_names(name, known))
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return NotFound(f"there is no {kind} {name!r}{hint}", close=close)


def bad(field: str, value: Any, message: str, fix: str) -> Invalid:
    """One field is wrong."""
    problem = SpecProblem(field=field, value=value, message=message, fix=fix)
    return Invalid(str(problem), problems=(problem,))
