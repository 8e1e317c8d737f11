"""Traces from files, and what to make of them: the part that opens files."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import TextIO

from scheduler.sim import traces as t
from scheduler.sim.traces import Workload

FORMATS = ("azure-llm", "azure-functions", "mooncake", "servegen")


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """A text file, unpacked where its name ends in .gz."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            yield file
    else:
        with path.open(encoding="utf-8", newline="") as file:
            yield file


def guess(path: Path) -> str:
    """The format of a trace, from its first line. Raises ValueError naming those there are."""
    with opened(path) as file:
        first = file.readline()
    if first.lstrip().startswith("{"):
        return "mooncake"
    for name, column in (
        ("azure-llm", "ContextTokens"),
        ("azure-functions", "end_timestamp"),
        ("servegen", "rate_rps"),
    ):
        if column in first:
            return name
    raise ValueError(f"{path} looks like no trace that is known; name its format: {FORMATS}")


def load(
    path: Path,
    format_name: str,
    random: Random,
    *,
    duration_s: float,
    models: int | None = None,
    rate_scale: float = 1.0,
    from_s: float = 0.0,
    exponent: float = 1.0,
    lengths: Path | None = None,
) -> Workload:
    """A workload from a trace file; `lengths`: an Azure LLM trace to draw token counts from.

    Raises ValueError for a file that cannot be read as that format, OSError.
    """
    tokens: t.Tokens = t.lognormal_tokens
    if lengths is not None:
        with opened(lengths) as file:
            tokens = t.tokens_of(t.azure_llm(file))
    try:
        with opened(path) as file:
            if format_name == "servegen":
                rates = t.servegen(file, from_s, duration_s)
                return t.from_servegen(
                    rates, random, duration_s=duration_s, rate_scale=rate_scale, models=models,
                    tokens=tokens,
                )  # fmt: skip
            if format_name == "azure-functions":
                calls = t.azure_functions(file)
                return t.from_functions(
                    calls, models or len(calls), random, duration_s=duration_s, tokens=tokens,
                    rate_scale=rate_scale,
                )  # fmt: skip
            read = t.mooncake if format_name == "mooncake" else t.azure_llm
            return t.split_bursts(
                read(file), models or 1, random, duration_s=duration_s, exponent=exponent,
                rate_scale=rate_scale, from_s=from_s,
            )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
