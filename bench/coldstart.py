"""From cold to the first token: plain vLLM against Stoker, real vLLM on CPU, in the same run.

    python bench/coldstart.py [--quick] [--json] [--case tiny|big|compiled ...] [--rounds N]

The baseline is `python -m vllm.entrypoints.openai.api_server` with the very arguments and
environment that Stoker uses: process start, health polled every 20 ms, then one streamed request.
Ours is one streamed request to the router of a running `stoker up` while the model is cold. The two
alternate; each figure is the median of its rounds. --quick: one round of the tiny model.

What Stoker itself adds is measured against a bound in seconds: from the request to the engine's
process (the kernel's stamp), and from the ready line in the engine's log to the first token, which
holds the engine's own work for that token (the plain engine's is shown beside it). The CPU seconds
of an engine's processes tell how much of a figure is a busy machine's.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.lib.real_engine import Plain, Start, Stoker, stoker_up, write_438_mb
from bench.lib.report import Row, print_report
from runtime.checkpoints.tiny_models import write_model
from runtime.wire.model_spec import ModelSpec

ROUNDS = 5
MIB = 2**20
OVERHEAD_S = 0.15  # may pass before the engine is asked, and again after it is ready
LABELS = {  # of the specs: what it is, and the ratio to reach
    "tiny": ("tiny, eager", "<= 0.083"),  # 12 times as fast
    "big": ("438 MB, eager", "<= 0.125"),  # 8 times
    "compiled": ("438 MB, torch.compile, not the first start", "<= 0.2"),  # 5 times
}


def measure(plain: Plain, stoker: Stoker, spec: ModelSpec, rounds: int) -> list[Row]:
    """Alternating cold starts, after an uncounted one of each kind: both find the page cache and
    their own compile caches as warm."""
    stoker.add(spec)
    stoker.start(spec)
    if "enforce_eager" not in spec.engine_args:
        plain.start(spec)
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(plain.start(spec))
        ours.append(stoker.start(spec))
    return rows_of(spec.name, ours, theirs)


def rows_of(case: str, ours: list[Start], theirs: list[Start]) -> list[Row]:
    """Medians of one case's rounds."""
    label, target = LABELS[case]
    served_s = _median(s.first_token_s - s.ready_s for s in ours)
    return [
        Row(f"cold to first token s, {label}", _median(s.first_token_s for s in ours),
            _median(s.first_token_s for s in theirs), "plain vLLM", target),
        Row(f"request to engine's process s, {label}", _median(s.forked_s for s in ours),
            OVERHEAD_S, "bound", "<= 1"),
        Row(f"engine ready to first token s, {label}", served_s, OVERHEAD_S, "bound", "<= 1"),
        Row(f"engine ready to first token s, {label}", served_s,
            _median(s.first_token_s - s.ready_s for s in theirs), "plain vLLM"),
        Row(f"CPU s of an engine to then, {label}", _median(s.cpu_s for s in ours),
            _median(s.cpu_s for s in theirs), "plain vLLM"),
        Row(f"MiB an engine (Pss), {label}", _median(s.pss_bytes / MIB for s in ours),
            _median(s.pss_bytes / MIB for s in theirs), "plain vLLM"),
    ]  # fmt: skip


def _median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def write_specs(folder: Path, cases: list[str]) -> list[ModelSpec]:
    """The models of the cases, written into `folder`."""
    tiny = write_model(folder, "tiny")
    big = write_438_mb(folder, tiny) if {"big", "compiled"} & set(cases) else tiny
    eager = {"enforce_eager": True, "max_model_len": 512}
    specs = {
        "tiny": ModelSpec(name="tiny", source=str(tiny), engine_args=eager),
        "big": ModelSpec(name="big", source=str(big), engine_args=eager),
        "compiled": ModelSpec(name="compiled", source=str(big), engine_args={"max_model_len": 512}),
    }
    return [specs[case] for case in cases]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of the tiny model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--case", nargs="+", choices=LABELS, help="only these")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each kind [{ROUNDS}]")
    options = parser.parse_args()
    cases = options.case or (["tiny"] if options.quick else list(LABELS))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stoker-bench-")))
        specs = write_specs(folder / "models", cases)
        stoker = stack.enter_context(stoker_up(folder))
        plain = Plain(folder)
        rows = []
        for spec in specs:
            rows += measure(plain, stoker, spec, 1 if options.quick else options.rounds)
        alone = stoker.launcher_pss_bytes() / MIB
        rows.append(Row("MiB the launcher holds (Pss), no engine up", alone, alone, "itself"))
    print_report("coldstart", rows, options.json)


if __name__ == "__main__":
    main()
