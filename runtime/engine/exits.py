"""What the end of an engine's process meant, from its status and the tail of its log. Pure.

vLLM reports a failure several times: the worker's traceback, then EngineCore's, then the API
server's, each wrapping the one before ("See root cause above"). The cause is the last exception
that is no such wrapper. A vLLM whose worker was killed ends with status 0, so the log counts more.
"""

from __future__ import annotations

import re
import signal

_PREFIX = re.compile(r"^\([^()]*\bpid=\d+\) ?(?:(?P<level>[A-Z]+) [\d-]+ [\d:.]+ \[[^\]]*\] ?)?")
_EXCEPTION = re.compile(
    r"^(?P<type>[A-Za-z_][\w.]*(?:Error|Exception|Interrupt))(?:: (?P<text>.*))?$"
)
_USAGE = re.compile(r"^\S+\.py: error: (?P<text>.*)$")
_INNER = re.compile(r"Worker failed with error '(?P<text>.*)', please check the stack trace")
_DIED = re.compile(r"(?P<who>\S+) died unexpectedly \(exit code: -(?P<signal>\d+)\)")
_ESCAPES = re.compile(r"\x1b\[[\d;]*m")
_WRAPPERS = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "EngineCore encountered an issue",
    "Executor failed",
)
_MAX_WORDS = 400
COMPILER_FIX = "install what it takes (on Debian: apt-get install g++ python3-dev)"
NUMA = "libnuma.so.1"
NUMA_FIX = "install it (on Debian: apt-get install libnuma1)"
# The same start fails again, until somebody changes the spec, the weights or the engine. Any other
# end may pass: a neighbour's memory, a port that was taken, a signal, a hub that was down.
FINAL_KINDS = frozenset({"bad_argument", "bad_model", "too_small"})

# What vLLM says where it cannot compile, mostly lines above an exception that tells less. It can go
# on without, so an end that has nothing to do with that is one of _SURE, and may pass.
_SURE = ("port_in_use", "oom", "too_small")
_NO_LIBRARY = re.compile(
    rf"{re.escape(NUMA)}: cannot open shared object|_OpNamespace' '_C' object has no attribute"
)
_NO_COMPILER = re.compile(
    r"No working C\+\+ compiler found|Failed to find C compiler"
    r"|fatal error: Python\.h: No such file|No such file or directory: '[^']*(?:g\+\+|gcc|clang)'"
)

# First match wins. Each line's pattern was seen in a real failure or stands in vLLM's sources.
_KINDS: tuple[tuple[str, str], ...] = (
    ("bad_argument", r"^usage: "),
    ("port_in_use", r"(?i)address already in use"),
    ("oom", r"out of memory|OutOfMemoryError|MemoryError|can't allocate memory|bad_alloc"),
    ("oom", r"Cannot allocate memory|less than requested memory for kv"),
    ("oom", r"is less than desired \w+ memory utilization|Error in memory profiling"),
    ("too_small", r"No available memory for the cache blocks"),
    ("too_small", r"larger than the available KV cache memory"),
    ("bad_model", r"Invalid repository ID or local directory|Model architectures .* not supported"),
    ("bad_model", r"Cannot find any model weights|SafetensorError|HFValidationError"),
    (
        "bad_model",
        r"LocalEntryNotFoundError|RepositoryNotFoundError|RevisionNotFoundError|GatedRepo",
    ),
    ("bad_model", r"does not appear to have a file named|Unrecognized model|[Tt]okenizer"),
    (
        "bad_model",
        r"size mismatch|were not initialized from checkpoint|no module or parameter named",
    ),
    ("bad_argument", r"ValidationError|max_model_len|--[a-z][a-z-]+"),
)


def explain(returncode: int | None, log_tail: str) -> tuple[str, str]:
    """(kind, words) of an engine's end; the kinds are `runtime.engine.EXIT_KINDS`."""
    if returncode is not None and returncode < 0:
        return _signalled(-returncode)  # Python's own errors end with a positive status
    lines = _lines(log_tail)
    if returncode == 0 and not any(wrapper in line for line in lines for wrapper in _WRAPPERS):
        return "exited", "it ended by itself with status 0"
    cause_at, cause = _cause(lines)
    died_at, died = _died(lines)
    if died and (not cause or died_at < cause_at):
        return died
    kind = next((k for k, pattern in _KINDS if re.search(pattern, cause)), "crash")
    if kind not in _SURE and (lacks := _host_lacks(lines)):
        return "bad_host", lacks
    if cause:
        return kind, _shorten(cause.removeprefix("usage: "))
    status = "an unknown status" if returncode is None else f"status {returncode}"
    last = next((line for line in reversed(lines) if line.strip()), "")
    return "crash", _shorten(
        f"it ended with {status}" + (f"; its last words: {last}" if last else "")
    )


def _host_lacks(lines: list[str]) -> str | None:
    """What the host has not got that vLLM asks for, with the fix."""
    for line in lines:
        if found := _NO_COMPILER.search(line):
            words = f"this host can't compile what vLLM wants to: {found[0]}"
            return _shorten(f"{words}; {COMPILER_FIX}")
        if _NO_LIBRARY.search(line):
            words = f"vLLM's compiled operations can't be loaded, most likely for want of {NUMA}"
            return f"{words}; {NUMA_FIX}"
    return None


def _lines(log_tail: str) -> list[str]:
    """The log's lines without vLLM's prefixes; what is only information is left out."""
    lines = []
    for raw in _ESCAPES.sub("", log_tail).splitlines():
        prefix = _PREFIX.match(raw)
        if prefix and prefix["level"] in ("DEBUG", "INFO", "WARNING"):
            continue
        lines.append(raw[prefix.end() :] if prefix else raw)
    return lines


def _cause(lines: list[str]) -> tuple[int, str]:
    """(line, words) of the last exception that only wraps no other; a usage error as `usage: …`."""
    for index in range(len(lines) - 1, -1, -1):
        if usage := _USAGE.match(lines[index]):
            return index, f"usage: {usage['text']}"
        found = _EXCEPTION.match(lines[index])
        text = (found["text"] or "") if found else ""
        if not found or text.startswith(_WRAPPERS):
            continue
        if inner := _INNER.search(text):
            return index, inner["text"]
        name = found["type"].rpartition(".")[2]
        if name == "ValidationError" and index + 1 < len(lines):
            # pydantic says what was wrong on the line below
            detail = lines[index + 1].strip().removeprefix("Value error, ")
            text = f"{text.rpartition(' for ')[2]}: {detail.partition(' [type=')[0]}"
        return index, f"{name}: {text}".removesuffix(": ")
    return -1, ""


def _died(lines: list[str]) -> tuple[int, tuple[str, str] | None]:
    """(line, verdict) where vLLM says that a signal ended one of its workers."""
    for index, line in enumerate(lines):
        if found := _DIED.search(line):
            kind, words = _signalled(int(found["signal"]))
            return index, (kind, words.replace("it was", f"{found['who']} was", 1))
    return -1, None


def _signalled(number: int) -> tuple[str, str]:
    crashed = number in (
        signal.SIGSEGV,
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGILL,
        signal.SIGFPE,
    )
    return ("crash" if crashed else "killed"), f"it was ended by {_signal_words(number)}"


def _signal_words(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL:
        return f"{name} (the kernel's out-of-memory killer, or someone)"
    return name


def _shorten(words: str) -> str:
    words = " ".join(words.split())
    return words if len(words) <= _MAX_WORDS else words[: _MAX_WORDS - 1] + "…"
