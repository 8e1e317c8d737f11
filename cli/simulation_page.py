"""One run as one HTML file: figures, plots as inline SVG, no network. Needs matplotlib.

Rules this file keeps: the same report gives the same bytes (no dates, fixed ids), and a plot that
would be too dense says what it leaves out.
"""

from __future__ import annotations

import io
from collections import defaultdict
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from runtime.sizes import GIB
from scheduler.sim.report import Report
from scheduler.sim.rule_checker import Segment

COLOURS = {
    "starting": "#f2a33c",
    "waking": "#f7d154",
    "ready": "#3f9b57",
    "draining": "#a5d6a7",
    "sleeping": "#a9c8ec",
    "asleep-1": "#4a86c8",
    "asleep-2": "#8d6cab",
    "stopping": "#9e9e9e",
    "backoff": "#c0392b",
    "failed": "#7b1c12",
}
RUNG_COLOURS = {
    "remote": "#7b1c12", "cached": "#c0392b", "staged": "#f2a33c", "snapshot": "#f7d154",
    "shell": "#2a9d8f", "asleep-2": "#8d6cab", "asleep-1": "#4a86c8",
}  # fmt: skip
GANTT_DEVICES = 12
LANES = 10  # replicas of one device that are drawn one above the other
MANY = 3000  # segments from which the Gantt is drawn as pixels inside the SVG
WIDTH_IN = 11.0

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2733;background:#f6f7f9;margin:0}
main{max-width:1180px;margin:0 auto;padding:24px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:17px;margin:0 0 8px}
section{background:#fff;border:1px solid #e1e5ea;border-radius:8px;padding:16px 20px;margin:16px 0}
p.note{color:#5b6875;font-size:13px;margin:6px 0 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px}
.tile{background:#fff;border:1px solid #e1e5ea;border-radius:8px;padding:12px 14px}
.tile b{display:block;font-size:21px}.tile span{color:#5b6875;font-size:13px}
table{border-collapse:collapse;font-size:14px}td,th{padding:3px 14px 3px 0;text-align:right}
td:first-child,th:first-child{text-align:left}th{color:#5b6875;font-weight:600}
svg{max-width:100%;height:auto}
"""


def page(report: Report, title: str = "Stoker, simulated") -> str:
    """The whole file."""
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "stoker", "font.size": 9, "axes.grid": True, "grid.alpha": 0.25,
            "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
            "figure.constrained_layout.use": True,
        }
    )  # fmt: skip
    parts = [
        ("Models on devices", _gantt(report), _gantt_note(report)),
        ("Time to first token", _cdf(report), "Answered requests; the time axis is logarithmic."),
        ("Requests that wait", _queue(report), "Held by the routers, all models together."),
        ("Device memory", _memory(report), "Bytes that replicas really hold on each device."),
        ("How replicas became hot", _climbs(report), "By the rung that each climb began from."),
    ]
    sections = "".join(
        f"<section><h2>{escape(head)}</h2>{svg}<p class=note>{escape(note)}</p></section>"
        for head, svg, note in parts
    )
    about = (
        f"seed {report.seed}, {report.duration_s:.0f} s, {report.devices} devices,"
        f" {report.models} models, {report.requests} requests"
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style><main>"
        f"<h1>{escape(title)}</h1><p class=note>{escape(about)}</p>{_tiles(report)}{sections}"
        f"<section><h2>Requests</h2>{_outcomes(report)}</section>"
        f"<section><h2>Models with the slowest first tokens</h2>{_slowest(report)}</section>"
        "</main></html>"
    )


# ------------------------------------------------------------------------------ words


def _tiles(r: Report) -> str:
    figures = [
        (f"{r.p50_ttft_s:.2f} s", "TTFT p50"),
        (f"{r.p95_ttft_s:.2f} s", "TTFT p95"),
        (f"{r.p99_ttft_s:.2f} s", "TTFT p99"),
        (f"{100 * r.within_objective:.1f} %", f"first token within {r.objective_s:g} s"),
        (f"{sum(r.climbs.values())}", "climbs to hot"),
        (f"{r.evictions}", "evictions"),
        (f"{r.gpu_hours_occupied:.1f}", f"GPU-hours occupied of {r.gpu_hours_there:.1f}"),
        (f"{len(r.violations)}", "broken rules"),
    ]
    tiles = "".join(
        f"<div class=tile><b>{escape(value)}</b><span>{escape(name)}</span></div>"
        for value, name in figures
    )
    return f"<div class=tiles>{tiles}</div>"


def _outcomes(r: Report) -> str:
    return _table(
        ("ended as", "requests", "share"),
        [
            (name, str(count), f"{100 * count / r.requests:.2f} %")
            for name, count in sorted(r.outcomes.items(), key=lambda item: -item[1])
        ],
    )


def _slowest(r: Report, shown: int = 12) -> str:
    slowest = sorted(r.by_model.items(), key=lambda item: -item[1][1])[:shown]
    return _table(
        ("model", "answered", "mean TTFT", "worst TTFT"),
        [(name, str(n), f"{mean:.2f} s", f"{worst:.2f} s") for name, (n, mean, worst) in slowest],
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


# ------------------------------------------------------------------------------ plots


def _gantt(r: Report) -> str:
    devices = list(r.sizes)[:GANTT_DEVICES]
    by_device: dict[str, list[Segment]] = defaultdict(list)
    for segment in r.segments:
        for device_id in segment.device_ids:
            by_device[device_id].append(segment)
    count = sum(len(by_device[d]) for d in devices)
    figure = Figure(figsize=(WIDTH_IN, 1.2 + 0.85 * len(devices)))
    axes = figure.add_subplot()
    for row, device_id in enumerate(devices):
        _device_row(axes, row, by_device[device_id], r.duration_s, rasterized=count > MANY)
    axes.set_yticks([row + 0.45 for row in range(len(devices))], devices)
    axes.set_ylim(len(devices), -0.1)
    axes.set_xlim(0, r.duration_s)
    axes.set_xlabel("time (s)")
    axes.grid(axis="y", visible=False)
    handles = [Patch(color=colour, label=state) for state, colour in COLOURS.items()]
    figure.legend(handles=handles, ncols=len(handles), loc="outside upper center", frameon=False)
    return _svg(figure)


def _device_row(
    axes: Any, row: int, segments: list[Segment], duration_s: float, rasterized: bool
) -> None:
    """Replicas of one device in lanes: each takes the first that is free all its life."""
    lives: dict[str, tuple[float, float]] = {}
    for s in segments:
        began, ended = lives.get(s.replica_id, (s.from_s, s.to_s))
        lives[s.replica_id] = (min(began, s.from_s), max(ended, s.to_s))
    lanes: list[float] = []
    lane_of: dict[str, int] = {}
    for replica_id, (began, ended) in sorted(lives.items(), key=lambda item: (item[1], item[0])):
        free = next((i for i, until in enumerate(lanes) if until <= began), len(lanes))
        if free == len(lanes):
            lanes.append(ended)
        lanes[free] = ended
        lane_of[replica_id] = free
    height = 0.9 / max(1, min(len(lanes), LANES))
    bars: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for s in segments:
        if (lane := lane_of[s.replica_id]) < LANES:
            bars[_state(s.state), lane].append((s.from_s, s.to_s - s.from_s))
            wide = s.to_s - s.from_s > duration_s / 25
            if wide and height > 0.1 and s.state in ("ready", "asleep-1", "asleep-2"):
                axes.text(
                    s.from_s + duration_s / 400, row + (lane + 0.5) * height, s.model,
                    fontsize=min(7.0, 50 * height), va="center", color="white", clip_on=True,
                )  # fmt: skip
    for (state, lane), spans in bars.items():
        axes.broken_barh(
            spans, (row + lane * height, height * 0.92), color=COLOURS.get(state, "#000000"),
            linewidth=0, rasterized=rasterized,
        )  # fmt: skip


def _state(state: str) -> str:
    """waking-1 -> waking; asleep-1 stays."""
    return state if state in COLOURS else state.rpartition("-")[0]


def _gantt_note(r: Report) -> str:
    note = "A bar is a replica; several on one device are drawn one above the other."
    if len(r.sizes) > GANTT_DEVICES:
        note += f" The first {GANTT_DEVICES} of {len(r.sizes)} devices."
    return note


def _cdf(r: Report) -> str:
    figure = Figure(figsize=(WIDTH_IN, 3.6))
    axes = figure.add_subplot()
    ordered = sorted(r.ttft)
    if ordered:
        step = max(1, len(ordered) // 2000)
        shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
        xs, ys = [*ordered[::step], ordered[-1]], [*shares[::step], 1.0]
        axes.step([max(x, 1e-3) for x in xs], ys, where="post", color="#2b6cb0", linewidth=1.8)
        for name, at in (
            ("p50", r.p50_ttft_s),
            ("p95", r.p95_ttft_s),
            ("p99", r.p99_ttft_s),
        ):
            axes.axhline(float(name[1:]) / 100, color="#999999", linewidth=0.6, linestyle=":")
            axes.annotate(
                f"{name} {at:.2f} s", (max(at, 1e-3), float(name[1:]) / 100),
                textcoords="offset points", xytext=(6, -11), fontsize=8,
            )  # fmt: skip
    axes.axvline(
        r.objective_s, color="#c0392b", linestyle="--", linewidth=1,
        label=f"objective {r.objective_s:g} s",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("time to first token (s)")
    axes.set_ylabel("share of answered requests")
    axes.legend(frameon=False, loc="lower right")
    return _svg(figure)


def _queue(r: Report) -> str:
    figure = Figure(figsize=(WIDTH_IN, 2.6))
    axes = figure.add_subplot()
    axes.fill_between(
        [at for at, _ in r.queue], [n for _, n in r.queue], step="post", color="#4a86c8", alpha=0.8
    )
    axes.set_xlim(0, r.duration_s)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("time (s)")
    axes.set_ylabel("requests that wait")
    return _svg(figure)


def _memory(r: Report) -> str:
    devices = list(r.sizes)
    figure = Figure(figsize=(WIDTH_IN, 1.4 + 0.16 * max(10, min(64, len(devices)))))
    axes = figure.add_subplot()
    shares = [[100 * used.get(d, 0) / r.sizes[d] for _, used in r.memory] for d in devices]
    end = r.memory[-1][0] if r.memory else r.duration_s
    shown = axes.imshow(
        shares, aspect="auto", interpolation="nearest", vmin=0, vmax=100, cmap="viridis",
        extent=(0, max(end, 1.0), len(devices), 0),
    )  # fmt: skip
    step = max(1, len(devices) // 16)
    axes.set_yticks([i + 0.5 for i in range(0, len(devices), step)], devices[::step])
    axes.grid(visible=False)
    axes.set_xlabel("time (s)")
    size = max(r.sizes.values(), default=0) / GIB
    figure.colorbar(shown, ax=axes, label=f"% held (100 % is {size:.0f} GiB)", pad=0.01)
    return _svg(figure)


def _climbs(r: Report) -> str:
    figure = Figure(figsize=(WIDTH_IN, 2.8))
    axes = figure.add_subplot()
    bins = 60
    width = r.duration_s / bins
    base = [0] * bins
    for rung in sorted(r.climbs, key=list(RUNG_COLOURS).index):
        counts = [0] * bins
        for at, climbed in r.climb_times:
            if climbed == rung:
                counts[min(bins - 1, int(at / width))] += 1
        axes.bar(
            [i * width for i in range(bins)], counts, width * 0.92, bottom=base, align="edge",
            color=RUNG_COLOURS[rung], label=f"{rung} ({r.climbs[rung]})",
        )  # fmt: skip
        base = [a + b for a, b in zip(base, counts, strict=True)]
    axes.set_xlim(0, r.duration_s)
    axes.set_xlabel("time (s)")
    axes.set_ylabel(f"climbs in {width:.0f} s")
    if r.climbs:
        axes.legend(frameon=False, ncols=6, loc="upper right")
        axes.set_ylim(0, 1.25 * max(base))
    return _svg(figure)


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
