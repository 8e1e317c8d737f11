"""`stoker simulate`: a cluster in virtual time, and what became of its requests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import click

from cli.simulation import make_node
from cli.simulation import simulate as run
from cli.tables import table
from cli.text import console, size
from runtime import outside
from runtime.contract.footprint_ledger import Footprint
from runtime.sim.profile import GPUS
from scheduler.core.turn import Settings
from scheduler.sim import catalog, faults, trace_files, traces
from scheduler.sim.report import Report
from scheduler.sim.rule_checker import Violation
from scheduler.sim.scenarios import random_scenario, run_random
from scheduler.sim.simulator import Fault, NodePlan, Scenario

_DAY_S = 86400.0


@click.command()
@click.option(
    "--scenario",
    type=click.Choice(["workload", "random"]),
    default="workload",
    show_default=True,
    help="A workload on a cluster, or a random one with faults.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="One seed, one run.")
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A trace file; without one, arrivals are generated.",
)
@click.option(
    "--format",
    "format_name",
    type=click.Choice(trace_files.FORMATS),
    help="The trace's format; left out: by its first line.",
)
@click.option(
    "--lengths",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="An Azure LLM trace to draw token counts from.",
)
@click.option("--from", "from_s", type=float, default=0.0, help="Begin there in the trace, in s.")
@click.option(
    "--duration",
    type=click.FloatRange(min=1),
    default=1800.0,
    show_default=True,
    help="Seconds of arrivals.",
)
@click.option("--models", type=click.IntRange(min=1), help="How many; default: the trace's, or 20.")
@click.option(
    "--rate",
    type=click.FloatRange(min=0),
    default=2.0,
    show_default=True,
    help="Generated requests per second, all models together.",
)
@click.option(
    "--cv",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Coefficient of variation of the gaps; 1 is Poisson.",
)
@click.option(
    "--power-law",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Exponent of the models' popularity.",
)
@click.option(
    "--diurnal",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="How much of the rate a day's trough loses.",
)
@click.option(
    "--rate-scale",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Multiplies a trace's rate.",
)
@click.option("--gpus", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--gpus-per-node", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--gpu", type=click.Choice(list(GPUS)), default="H100", show_default=True)
@click.option(
    "--ledger",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measured footprints (a JSON list) that win over the profile.",
)
@click.option(
    "--params", type=float, metavar="BILLIONS", help="All models of that size; left out: a mix."
)
@click.option(
    "--on-disk",
    type=click.Choice(["all", "none"]),
    default="all",
    show_default=True,
    help="Whose files the nodes have at the start.",
)
@click.option("--idle-s", type=float, default=300.0, show_default=True, help="As in a spec.")
@click.option("--routers", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--fault",
    "fault_texts",
    multiple=True,
    metavar="KIND[:NODE]@SECONDS",
    help="lose, vanish, return, restart-agent, slow-disk (all of a node), fail-over.",
)
@click.option("--objective", type=float, default=5.0, show_default=True, help="TTFT, in seconds.")
@click.option("--check/--no-check", default=True, help="Hold the invariants after each event.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a report with plots to this file.",
)
@click.option(
    "--decisions",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write every decision to this file, one a line.",
)
def simulate(**o: Any) -> None:
    """Run a cluster in virtual time with the production scheduler, agents and router."""
    try:
        report = _run(o)
    except Violation as violation:
        replay = f"stoker simulate --scenario {o['scenario']} --seed {o['seed']}"
        raise click.ClickException(f"{violation}\nreplay: {replay}") from None
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    if o["decisions"]:
        o["decisions"].write_text("\n".join([*report.log(), ""]), encoding="utf-8")
    if o["html"]:
        write_html(report, o["html"])
    if o["as_json"]:
        click.echo(json.dumps(report.summary(), indent=2))
    else:
        show(report)


def write_html(report: Report, path: Path) -> None:
    """The report with plots. Raises ClickException where matplotlib is missing."""
    try:
        from cli.simulation_page import page
    except ImportError as error:
        raise click.ClickException(
            f"the HTML report needs matplotlib ({error}); install it: pip install"
            " 'stoker-serve[sim]'"
        ) from None
    path.write_text(page(report), encoding="utf-8")
    click.echo(f"wrote {path} ({size(path.stat().st_size)})", err=True)


def _run(o: dict[str, Any]) -> Report:
    if o["scenario"] == "random":
        for fault in random_scenario(o["seed"]).faults:
            click.echo(f"  {fault.at_s:7.1f} s  {fault.what}", err=True)
        return run_random(o["seed"], make_node)
    return run(_scenario(o))


def _scenario(o: dict[str, Any]) -> Scenario:
    random = Random(o["seed"])
    workload = _workload(o, random)
    if o["params"]:
        models = [catalog.sized(name, o["params"], idle_s=o["idle_s"]) for name in workload.models]
    else:
        models = catalog.drawn(workload.models, random, idle_s=o["idle_s"])
    ledger: tuple[Footprint, ...] = ()
    if o["ledger"]:
        ledger = outside.decode(o["ledger"].read_bytes(), tuple[Footprint, ...])
    return Scenario(
        nodes=_nodes(o), models=models, arrivals=workload.arrivals, seed=o["seed"],
        facts=catalog.facts(models), ledger=ledger, learned=ledger, on_disk=o["on_disk"],
        faults=[_fault(text, _nodes(o)) for text in o["fault_texts"]], routers=o["routers"],
        settings=Settings(), duration_s=workload.duration_s, objective_s=o["objective"],
        check=o["check"],
    )  # fmt: skip


def _workload(o: dict[str, Any], random: Random) -> traces.Workload:
    if o["trace"] is None:
        return traces.generate(
            o["models"] or 20, o["rate"], random, duration_s=o["duration"], cv=o["cv"],
            exponent=o["power_law"], diurnal=o["diurnal"], day_s=_DAY_S,
        )  # fmt: skip
    return trace_files.load(
        o["trace"], o["format_name"] or trace_files.guess(o["trace"]), random,
        duration_s=o["duration"], models=o["models"], rate_scale=o["rate_scale"],
        from_s=o["from_s"], exponent=o["power_law"], lengths=o["lengths"],
    )  # fmt: skip


def _nodes(o: dict[str, Any]) -> list[NodePlan]:
    nodes: list[NodePlan] = []
    left = o["gpus"]
    while left > 0:
        count = min(left, o["gpus_per_node"])
        nodes.append(NodePlan(f"n{len(nodes)}", devices=count, gpu=o["gpu"]))
        left -= count
    return nodes


def _fault(text: str, nodes: list[NodePlan]) -> Fault:
    kind, _, rest = text.partition("@")
    kind, _, node = kind.partition(":")
    known = [n.node_id for n in nodes]
    if kind != "fail-over" and node not in known:
        raise ValueError(f"--fault {text!r}: there is no node {node!r}; choose {', '.join(known)}")
    acts: dict[str, Callable[[str], faults.Act]] = {
        "lose": faults.lose_node,
        "vanish": faults.vanish_node,
        "return": faults.return_node,
        "restart-agent": faults.restart_agent,
        "slow-disk": lambda name: faults.slow_disk(name, 0.3e9),
        "fail-over": lambda name: faults.fail_over(5.0),
    }
    try:
        return Fault(float(rest), text, acts[kind](node))
    except (KeyError, ValueError):
        raise ValueError(
            f"--fault {text!r} is not a fault; write e.g. lose:n0@600, return:n0@660, fail-over@900"
        ) from None


# ------------------------------------------------------------------------------ the table


def show(report: Report) -> None:
    """The report as tables."""
    out = console()
    out.print(table(("FIGURE", ">VALUE"), _figures(report)))
    out.print()
    out.print(
        table(
            ("BECAME HOT FROM", ">TIMES", ">PER 1000 REQUESTS"),
            [
                (rung, str(count), f"{report.cold_starts_per_1000[rung]:.1f}")
                for rung, count in report.climbs.items()
            ],
        )
    )


def _figures(r: Report) -> list[tuple[str, str]]:
    outcomes = ", ".join(f"{count} {name}" for name, count in r.outcomes.items())
    return [
        ("simulated", f"{r.duration_s:.0f} s, {r.devices} devices, {r.models} models"),
        ("requests", f"{r.requests} ({outcomes})"),
        ("TTFT mean", f"{r.mean_ttft_s:.3f} s"),
        ("TTFT p50 / p95 / p99", f"{r.p50_ttft_s:.3f} / {r.p95_ttft_s:.3f} / {r.p99_ttft_s:.3f} s"),
        (f"within {r.objective_s:g} s", f"{100 * r.within_objective:.2f} %"),
        ("had to wait", f"{r.held} answered requests"),
        ("evictions", str(r.evictions)),
        ("GPU-hours occupied", f"{r.gpu_hours_occupied:.2f} of {r.gpu_hours_there:.2f}"),
        ("GPU-hours of memory held", f"{r.gpu_hours_held:.2f}"),
        ("events", str(r.events)),
        ("violations", str(len(r.violations))),
    ]
