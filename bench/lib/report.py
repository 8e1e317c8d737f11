"""How every benchmark reports: rows of ours against a baseline from the same run."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One figure. `target` bounds `ratio` (ours / baseline), such as "<= 2", or our own figure,
    such as "ours <= 0.4"; None: only shown."""

    metric: str
    ours: float
    baseline: float
    baseline_name: str
    target: str | None = None

    @property
    def ratio(self) -> float:
        return self.ours / self.baseline if self.baseline else float("inf")

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        *own, sign, bound = self.target.split()
        value = self.ours if own else self.ratio
        return value <= float(bound) if sign == "<=" else value >= float(bound)

    def shown(self) -> dict[str, Any]:
        ratio = None if self.ratio == float("inf") else round(self.ratio, 3)
        return {
            "metric": self.metric, "ours": round(self.ours, 4),
            "baseline": round(self.baseline, 4), "baseline_name": self.baseline_name,
            "ratio": ratio, "target": self.target, "met": self.met,
        }  # fmt: skip


def print_report(name: str, rows: list[Row], as_json: bool, note: str | None = None) -> None:
    """One JSON object, or a table for people. `note`: what a reader must know of the figures, or
    why there are none."""
    if as_json:
        report = {"name": name, "rows": [row.shown() for row in rows]}
        print(json.dumps(report | ({"note": note} if note else {})))
        return
    if note:
        print(f"{name}: {note}")
    if not rows:
        return
    print(f"{name}\n{'metric':44} {'ours':>12} {'baseline':>12} {'':14} {'ratio':>7}  target")
    for row in rows:
        verdict = "" if row.met is None else ("met" if row.met else "MISSED")
        print(
            f"{row.metric:44} {row.ours:12.4g} {row.baseline:12.4g} {row.baseline_name:14} "
            f"{row.ratio:7.2f}  {row.target or ''} {verdict}"
        )
