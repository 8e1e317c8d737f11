"""A word that somebody else chose becomes a path by `runtime.places`, and nowhere else.

What is looked for: `/`, joinpath and os.path.join of a folder with what is no literal, also within
an f-string; and what follows links or unpacks archives outside of the files that check them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.unit.rules.product import sources, text

HOME = "runtime/places.py"
FOLDER = re.compile(
    r"(folder|dir|root|path|(?<!pro)files?|logs|staging|shared|parent|target|cache|cgroup|store|snapshot)"
    r"|Path\(", re.I,
)  # fmt: skip
CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*")
UNPACKERS = ("extractall", "unpack_archive", "copytree")
# file -> (the expressions that may stay, why)
ALLOWED: dict[str, tuple[set[str], str]] = {
    "agent/cache/store.py": ({"folder / name"}, "literals in a loop"),
    "agent/cache/resolve.py": (
        {"model_dir.joinpath(source)", "Path(config.shared_dir).joinpath(source)"},
        "words of a message: where it was looked for",
    ),
    "agent/weights/compile_cache.py": (
        {"self._cache_dir.resolve() / path.relative_to(self._cache_dir)",
         "tar.extractall(target, members, filter='data')"},
        "compared with where the path really leads; members are checked one by one, and no links",
    ),
    "agent/devices/inventory.py": (
        {"root / path.lstrip('/')"},
        "the kernel's word: /proc/self/cgroup",
    ),
    "agent/engines/process.py": (
        {"Path(roots[0]) / own[0].lstrip('/')",
         "_own_cgroup() / f'stoker-{hashlib.sha256(whose).hexdigest()[:12]}'"},
        "the kernel's word, and a digest",
    ),
    "cli/showcase.py": ({"folder / name"}, "names of the demo's own models"),
    "cli/stack.py": ({"logs / f'{name}.log'"}, "names of the parts"),
    "runtime/engine/vllm/engine.py": ({"folder / f'.runtime-{os.getpid()}'"}, "a number"),
    "runtime/router/control/other_workers.py": (
        {"folder / f'router-{index}.sock'", "folder / f'router-{n}.sock'"}, "numbers",
    ),
    "runtime/checkpoints/tiny_models.py": ({"target / file"}, "literals in a loop"),
}  # fmt: skip


def second_ways(source: str) -> Iterator[tuple[int, str]]:
    """(line, expression) of everything that makes a path by hand."""
    for node in ast.walk(ast.parse(source)):
        words = ast.unparse(node) if isinstance(node, ast.BinOp | ast.Call) else ""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and _joins(node):
            yield node.lineno, words
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func).rpartition(".")[2]
            several = called == "Path" and len(node.args) > 1
            if several or called in UNPACKERS or (called in ("joinpath", "join") and _named(node)):
                yield node.lineno, words


def _joins(node: ast.BinOp) -> bool:
    right = node.right
    name = right.value if isinstance(right, ast.Subscript) else right
    literal = isinstance(right, ast.Constant) or (
        isinstance(name, ast.Name) and CONSTANT.fullmatch(name.id) is not None
    )
    text = isinstance(right, ast.JoinedStr)
    return not literal and (text or FOLDER.search(ast.unparse(node.left)) is not None)


def _named(node: ast.Call) -> bool:
    """Whether a joinpath, or an os.path.join, is given what is no literal."""
    called = ast.unparse(node.func)
    if called.endswith(".join") and not called.endswith("path.join"):
        return False
    return not all(isinstance(word, ast.Constant) for word in node.args)


def _sums(words: str) -> bool:
    """A quotient of numbers whose names look like a folder's."""
    return "target.weight" in words


def test_there_is_one_way_to_a_path() -> None:
    found = []
    for path in sources(but=HOME):
        allowed = ALLOWED.get(path, (set(), ""))[0]
        for line, words in second_ways(text(path)):
            if words not in allowed and not _sums(words):
                found.append(f"{path}:{line}: {words}: use runtime.places.inside or below")
    assert found == []


def test_what_is_allowed_is_still_there() -> None:
    for path, (allowed, _) in ALLOWED.items():
        found = {words for _, words in second_ways(text(path))}
        assert allowed <= found, f"{path}: drop {allowed - found} from the list"


@pytest.mark.parametrize(
    "planted",
    [
        'x = root / (name if ref.asked == "main" else f"{name}@{ref.asked}")',
        'x = self._folder / f"{replica_id}.json"',
        "x = self._logs / name",
        "x = Path(model_dir) / source",
        "x = shared_dir.joinpath(source)",
        "x = os.path.join(folder, name)",
        "x = Path(folder, name)",
        'x = staging / "sub" / file.path',
        "tar.extractall(target)",
        "shutil.copytree(source, target)",
    ],
)
def test_a_second_way_is_found(planted: str) -> None:
    assert list(second_ways(planted)), planted


@pytest.mark.parametrize(
    "plain",
    ['x = folder / "config.json"', "x = folder / CONFIG", "x = total / count", '", ".join(names)',
     "x = places.below(root, name)", 'x = Path("/proc") / "stat"'],
)  # fmt: skip
def test_what_is_no_join_of_a_word_is_let_be(plain: str) -> None:
    assert list(second_ways(plain)) == []
