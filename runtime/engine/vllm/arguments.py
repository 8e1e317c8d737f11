"""Checks a spec's engine arguments against vLLM's own option table, without starting vLLM.

The table is vLLM's argument parser, dumped once a version by the interpreter vLLM is installed in
(that import takes 10 s) and kept in `cache_dir`. Nothing about single options is repeated here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from runtime import places
from runtime.contract.schema import close_names
from runtime.wire.agent_messages import SpecProblem

DUMP_TIMEOUT_S = 300.0

# Options that would take an engine out of what Stoker accounts for, guards or can reach.
REFUSED = {
    "config": "write its options into engine_args",
    "headless": "an engine must serve HTTP",
    "grpc": "an engine must serve HTTP",
    "grpc_port": "an engine must serve HTTP",
    "api_server_count": "one API server counts a replica's requests; set max_replicas for more",
    "pipeline_parallel_size": "set `tensor_parallel_size` beside engine_args",
    "data_parallel_size": "set `max_replicas` beside engine_args",
    "ssl_keyfile": "routers reach engines over plain HTTP; end TLS before the router",
    "ssl_certfile": "routers reach engines over plain HTTP; end TLS before the router",
    "device_memory_utilization": "set `device_memory_bytes`",
    "hf_token": "a secret may not stand in arguments; set HF_TOKEN in the agent's environment",
}

# Run by the engine's interpreter; writes to a file because vLLM logs to stdout.
_DUMP = """
import json, sys
from vllm.utils.argparse_utils import FlexibleArgumentParser
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.openai.cli_args import make_arg_parser

def type_name(kind):
    code = getattr(kind, "__code__", None)
    if code and "return_type" in code.co_freevars:  # optional_type(x), parse_type(x)
        return type_name(kind.__closure__[code.co_freevars.index("return_type")].cell_contents)
    return getattr(kind, "__name__", str(kind)) if kind else None

table = []
for action in make_arg_parser(FlexibleArgumentParser())._actions:
    if action.option_strings and action.dest != "help":
        choices = action.choices and [str(c) for c in action.choices if c is not None]
        table.append({
            "flags": action.option_strings, "type_name": type_name(action.type),
            "choices": choices or [], "nargs": action.nargs, "action": type(action).__name__,
        })
with open(sys.argv[1], "w") as out:
    json.dump(table, out)
"""

_SWITCH = "_StoreTrueAction"
_JSON_TYPES = ("loads", "parse_dataclass", "union_dict_and_str")
_SUFFIXES = {
    "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40,
}  # fmt: skip


class Option(Struct, frozen=True, kw_only=True):
    """One option of vLLM's parser, as argparse has it."""

    flags: tuple[str, ...]
    type_name: str | None
    choices: tuple[str, ...]
    nargs: int | str | None
    action: str

    @property
    def negatable(self) -> bool:
        """Whether it is a yes/no flag with a `--no-` form."""
        return self.action == "BooleanOptionalAction"


class TableError(Exception):
    """vLLM's option table could not be had; the message says why."""


def flat_args(engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """Engine arguments under one spelling: `--max-model-len` and `max_model_len` are the same."""
    return {key.lstrip("-").replace("-", "_"): value for key, value in engine_args.items()}


def human_int(value: object) -> int:
    """An integer as vLLM reads it: 4096, "4096", "4k" (4000), "4K" (4096), "25.6k".

    Raises ValueError for anything else.
    """
    text = str(value).strip()
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT])", text)
    if found and (found[2].islower() or "." not in found[1]):
        return int(float(found[1]) * _SUFFIXES[found[2]])
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    raise ValueError(f"{value!r} is not a whole number; write e.g. 4096, 4k (4000) or 4K (4096)")


def to_flags(engine_args: Mapping[str, Any]) -> list[str]:
    """Engine arguments as a command line.

    True is `--flag`, False `--no-flag`, a list several values, a mapping JSON, None nothing.
    """
    words: list[str] = []
    for key, value in engine_args.items():
        flag = _flag(key)
        if value is None:
            continue
        if value is True:
            words.append(flag)
        elif value is False:
            words.append("--no-" + flag.removeprefix("--"))
        elif isinstance(value, (list, tuple)):
            words += [flag, *map(_word, value)]
        else:
            words.append(f"{flag}={_word(value)}")
    return words


def refused_args(engine_args: Mapping[str, Any]) -> list[SpecProblem]:
    """A problem for each argument that Stoker can't let through."""
    return [
        SpecProblem(
            field=f"engine_args.{key}",
            value=value,
            message="cannot be set under Stoker",
            fix=REFUSED[_name(key)],
        )
        for key, value in engine_args.items()
        if _name(key) in REFUSED
    ]


def check_against(table: list[Option], engine_args: Mapping[str, Any]) -> list[SpecProblem]:
    """Everything in `engine_args` that vLLM's parser would refuse."""
    options = {flag: option for option in table for flag in option.flags}
    problems = []
    for key, value in engine_args.items():
        option = options.get(_flag(key).partition(".")[0])
        if option is None:
            problems.append(_unknown(key, value, options))
        elif value is not None and "." not in key:
            problems += _refused_value(key, value, option)
    return problems


def load_table(python: str, version: str, cache_dir: str) -> list[Option]:
    """vLLM's option table, from `cache_dir` or else from vLLM. Raises TableError."""
    cached = places.below(cache_dir, f"vllm-options-{version}.json")
    try:
        return _decode(cached.read_bytes())
    except (OSError, msgspec.DecodeError):
        pass  # never dumped, or cut off: dump it
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".options-", dir=cache_dir) as folder:
        fresh = Path(folder) / "table.json"
        _dump(python, fresh)
        table = _decode(fresh.read_bytes())
        os.replace(fresh, cached)
    return table


def _decode(data: bytes) -> list[Option]:
    return msgspec.json.decode(data, type=list[Option])


def _dump(python: str, target: Path) -> None:
    command = [python, "-c", _DUMP, str(target)]
    try:
        # Its own folder as cwd: `-c` puts the cwd first on sys.path.
        done = subprocess.run(
            command, cwd=target.parent, capture_output=True, text=True, timeout=DUMP_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise TableError(f"importing vLLM took longer than {DUMP_TIMEOUT_S:.0f} s") from None
    except OSError as error:
        raise TableError(str(error)) from None
    if done.returncode or not target.is_file():
        lines = done.stderr.strip().splitlines()
        raise TableError(lines[-1] if lines else f"{python} ended with {done.returncode}")


def _name(key: str) -> str:
    return key.lstrip("-").partition(".")[0].replace("-", "_").removeprefix("no_")


def _flag(key: str) -> str:
    base, dot, rest = key.lstrip("-").partition(".")
    return "--" + base.replace("_", "-") + dot + rest


def _word(value: object) -> str:
    return json.dumps(value) if isinstance(value, (dict, list, tuple)) else str(value)


def _unknown(key: str, value: object, options: Mapping[str, Option]) -> SpecProblem:
    close = close_names(_flag(key), [flag for flag in options if flag.startswith("--")])
    names = [flag.removeprefix("--").replace("-", "_") for flag in close]
    return SpecProblem(
        field=f"engine_args.{key}",
        value=value,
        message="is not an option of vLLM",
        fix=f"did you mean {' or '.join(names)}?" if names else "see `vllm serve --help=all`",
    )


def _refused_value(key: str, value: object, option: Option) -> list[SpecProblem]:
    message, fix = _verdict(value, option)
    if not message:
        return []
    return [SpecProblem(field=f"engine_args.{key}", value=value, message=message, fix=fix)]


def _verdict(value: object, option: Option) -> tuple[str | None, str | None]:
    """(what is wrong with a value, how to fix it), or (None, None)."""
    if option.negatable:
        return (
            (None, None) if isinstance(value, bool) else ("is a yes/no flag", "write true or false")
        )
    if option.action == _SWITCH:
        return (None, None) if value is True else ("is a switch", "write true, or leave it out")
    if isinstance(value, bool):
        bare = value and option.nargs == "?"
        return (None, None) if bare else ("needs a value", _expected(option))
    if isinstance(value, (list, tuple)):
        return _list_verdict(list(value), option)
    if isinstance(value, dict):
        fits = option.type_name in _JSON_TYPES
        return (None, None) if fits else ("takes no mapping", _expected(option))
    return _word_verdict(str(value), option)


def _list_verdict(values: list[object], option: Option) -> tuple[str | None, str | None]:
    if option.nargs in (None, "?"):
        return "takes one value, not a list", _expected(option)
    if isinstance(option.nargs, int) and len(values) != option.nargs:
        return f"takes {option.nargs} values", None
    if not values and option.nargs == "+":
        return "needs at least one value", "leave it out"
    verdicts = (_word_verdict(_word(value), option) for value in values)
    return next((v for v in verdicts if v[0]), (None, None))


def _word_verdict(word: str, option: Option) -> tuple[str | None, str | None]:
    if option.choices and word not in option.choices:
        close = close_names(word, option.choices)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return "is not allowed", f"{hint}choose one of: {', '.join(option.choices)}"
    try:
        _read(word, option.type_name)
    except ValueError:
        return "has the wrong type", _expected(option)
    return None, None


def _read(word: str, type_name: str | None) -> None:
    if type_name == "int":
        int(word)
    elif type_name == "float":
        float(word)
    elif type_name == "human_readable_int" or (
        type_name == "human_readable_int_or_auto" and word.lower() not in ("auto", "-1")
    ):
        human_int(word)
    elif type_name == "loads":
        json.loads(word)


def _expected(option: Option) -> str | None:
    expected = {
        "int": "write a whole number",
        "float": "write a number",
        "human_readable_int": "write a whole number, e.g. 4096, 4k (4000) or 4K (4096)",
        "human_readable_int_or_auto": "write a whole number, e.g. 4096 or 4K (4096), or auto",
        "loads": "write a mapping or JSON text",
        "parse_dataclass": "write a mapping or JSON text",
    }
    return expected.get(option.type_name or "", "write one text")
