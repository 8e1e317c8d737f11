"""What production and the simulator both go by is written once, in production.

Checked of each file of a simulator, as far as names can tell:
- a constant, or a default of an argument or a field, that is called as a constant of production or
  a setting is imported from there, not written again;
- no comment says that a number comes from a file of production: whoever writes that copies it.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator

import msgspec
import pytest

from runtime.contract import config
from tests.unit.rules.product import sources, text

SIMULATORS = ("agent/sim", "scheduler/sim", "runtime/sim", "bench/policies")
PRODUCTION = ("runtime", "scheduler", "agent")
SETTINGS = (config.RouterConfig, config.SchedulerConfig, config.AgentConfig)

_COPIED = re.compile(r"#.*\b(?:runtime|scheduler|agent)/[\w/]+\.py")


def is_number(node: ast.AST | None) -> bool:
    """Whether an expression is made of literal numbers alone."""
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float)
    if isinstance(node, ast.UnaryOp):
        return is_number(node.operand)
    return isinstance(node, ast.BinOp) and is_number(node.left) and is_number(node.right)


def _pairs(target: ast.AST, value: ast.AST | None) -> Iterator[tuple[str, ast.AST | None]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for one, its in zip(target.elts, value.elts, strict=True):
            yield from _pairs(one, its)


def constants(tree: ast.Module) -> set[str]:
    """The names of a module's numbers."""
    found = set()
    for node in tree.body:
        targets: list[ast.AST] = []
        if isinstance(node, ast.Assign):
            targets = list(node.targets)
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        else:
            continue
        for target in targets:
            found |= {name for name, value in _pairs(target, node.value) if is_number(value)}
    return found


def defaults(tree: ast.Module) -> set[str]:
    """The names of arguments and fields whose default is a number."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and is_number(field.value):
                    found |= {name for name, _ in _pairs(field.target, field.value)}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            of = node.args
            late = [*of.posonlyargs, *of.args][-len(of.defaults) :] if of.defaults else []
            given = [*zip([*late, *of.kwonlyargs], [*of.defaults, *of.kw_defaults], strict=True)]
            found |= {arg.arg for arg, value in given if is_number(value)}
    return found


def settings() -> set[str]:
    """The names of the configuration's numbers."""
    fields = (field for kind in SETTINGS for field in msgspec.structs.fields(kind))
    return {field.name for field in fields if type(field.default) in (int, float)}


def production() -> set[str]:
    """The names of production's constants and settings, as a simulator's constant would have it."""
    paths = (path for path in sources(*PRODUCTION) if not path.startswith(SIMULATORS))
    names = {name for path in paths for name in constants(ast.parse(text(path)))}
    return {name.lstrip("_") for name in names} | {name.upper() for name in settings()}


def written_again(path: str, source: str, known: set[str]) -> list[str]:
    """Every number of a simulator's file that production has, in words."""
    tree = ast.parse(source)
    own = {name for name in constants(tree) if name.lstrip("_") in known}
    # Of one word, as `most`, a name says too little.
    own |= {name for name in defaults(tree) if "_" in name and name.upper() in known}
    found = [f"{path}: {name} is production's too: import it from there" for name in sorted(own)]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and _COPIED.search(token.string):
            number = re.search(r"\d", token.line[: token.start[1]])
            if number:
                found.append(f"{path}:{token.start[0]} copies a number: {token.string}")
    return found


KNOWN = production()


@pytest.mark.parametrize("path", sources(*SIMULATORS))
def test_a_simulator_imports_what_production_has(path: str) -> None:
    assert written_again(path, text(path), KNOWN) == []


@pytest.mark.parametrize(
    "planted",
    [
        "TICK_S = 0.5",
        "_TICK_S: float = 0.25 * 2",
        "START_TIMEOUT_S, MAX_RESTARTS = 600.0, 3",
        "HEARTBEAT_S = 1.0",
        "@dataclass\nclass Plan:\n    start_timeout_s: float = 600.0",
        "def f(x, node_timeout_s=10.0): ...",
        "def f(*, drain_grace_s: float = 60): ...",
        "PAUSE_S = 0.1  # agent/engines/probe.py",
    ],
)
def test_a_planted_copy_is_found(planted: str) -> None:
    assert written_again("agent/sim/planted.py", planted, KNOWN)


@pytest.mark.parametrize(
    "fine",
    [
        "from agent.core.periods import TICK_S",
        "HEARTBEAT_S = AgentConfig().heartbeat_s",
        "FORK_S = 0.4  # [facts] a fork from the pre-imported parent",
        "def f(zombie_s=0.0): ...\ndef g(start_timeout_s): ...",
        "# As agent/driver.py does it.\nx = 1",
    ],
)
def test_what_is_the_simulators_own_is_not_reported(fine: str) -> None:
    assert written_again("agent/sim/planted.py", fine, KNOWN) == []
