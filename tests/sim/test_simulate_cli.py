"""`stoker simulate` as its user calls it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.main import stoker
from tests.kits.azure_trace import AZURE

SMALL = ["simulate", "--models", "3", "--gpus", "1", "--duration", "120", "--rate", "0.5"]


def invoke(*args: str) -> str:
    ran = CliRunner().invoke(stoker, args)
    assert ran.exit_code == 0, ran.output
    return ran.stdout


def test_the_table_and_the_json_say_the_same() -> None:
    shown = invoke(*SMALL)
    told = json.loads(invoke(*SMALL, "--json"))
    assert told["violations"] == []
    assert told["outcomes"]["answered"] == told["requests"] > 20
    assert f"{told['p99_ttft_s']:.3f}" in shown
    assert "BECAME HOT FROM" in shown


def test_a_trace_file_and_a_decision_log(tmp_path: Path) -> None:
    trace, log = tmp_path / "t.csv", tmp_path / "log.txt"
    trace.write_text(AZURE)
    told = json.loads(
        invoke("simulate", "--trace", str(trace), "--duration", "60", "--gpus", "1", "--json",
               "--decisions", str(log))
    )  # fmt: skip
    assert told["requests"] == 3
    assert re.search(r"^\d+\.\d+ start m0 m0-1-1 n0: ", log.read_text(), re.MULTILINE)


def test_a_random_scenario_names_its_faults() -> None:
    ran = CliRunner().invoke(stoker, ["simulate", "--scenario", "random", "--seed", "3"])
    assert ran.exit_code == 0, ran.output
    assert "all is well again" in ran.stderr


def test_faults_can_be_written_down_and_mistakes_are_named() -> None:
    told = json.loads(
        invoke(*SMALL, "--gpus", "2", "--gpus-per-node", "1", "--json", "--fault", "lose:n0@60",
               "--fault", "return:n0@70", "--fault", "fail-over@90")
    )  # fmt: skip
    assert told["actions"]["adopt"] >= 1
    gone = CliRunner().invoke(stoker, [*SMALL, "--fault", "lose:n9@5"])
    assert gone.exit_code == 1
    assert "--fault 'lose:n9@5': there is no node 'n9'; choose n0" in gone.output + str(
        gone.exception
    )
    bad = CliRunner().invoke(stoker, [*SMALL, "--fault", "burn:n0@5"])
    assert bad.exit_code == 1
    assert "write e.g. lose:n0@600" in bad.output


def test_the_html_report_is_one_file_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `sim` is not installed")
    one, other = tmp_path / "a.html", tmp_path / "b.html"
    invoke(*SMALL, "--html", str(one))
    invoke(*SMALL, "--html", str(other))
    text = one.read_text()
    assert text == other.read_text()
    assert text.count("<svg") == 5
    assert "p99" in text
    links = re.findall(r"""(?:src|href)=["']([^"'#][^"']*)["']""", text)
    assert [link for link in links if not link.startswith("data:")] == []


def test_a_missing_matplotlib_is_said(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from cli.main import main\n"
        f"main({[*SMALL, '--html', str(tmp_path / 'x.html')]!r})"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 1
    assert "stoker-serve[sim]" in ran.stderr


def test_many_scenarios_run_in_parallel() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "cli.simulate_many", "--count", "3", "--jobs", "2"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "3 of 3 scenarios" in ran.stdout
