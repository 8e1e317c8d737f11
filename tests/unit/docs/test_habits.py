"""What GitHub and pre-commit are told to run is what is run here."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import yaml

from tests.kits.checkout import ROOT
from tests.unit.docs.pages import PAGES, text
from tests.unit.rules.product import PARTS

TARGETS = set(re.findall(r"^([a-z][a-z-]*):", text("Makefile"), re.MULTILINE))
WORKFLOW: dict[str, Any] = yaml.safe_load(text(".github/workflows/ci.yml"))
YAML_FILES = [".pre-commit-config.yaml", ".github/dependabot.yml"] + [
    path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(".github/*/*.yml"))
]


def commands(job: str) -> list[str]:
    return [step["run"] for step in WORKFLOW["jobs"][job]["steps"] if "run" in step]


@pytest.mark.parametrize("path", YAML_FILES)
def test_every_file_can_be_read(path: str) -> None:
    assert yaml.safe_load(text(path))


def test_the_workflow_runs_make_and_what_ci_runs() -> None:
    assert set(WORKFLOW["jobs"]) == {"lint", "unit", "test", "wheel"}
    for job in WORKFLOW["jobs"]:
        for command in commands(job):
            assert command == ".ci/run" or command.removeprefix("make ") in TARGETS, command
    assert commands("lint")[-1] == "make lint"
    assert commands("unit")[-1] == "make unit"
    assert commands("test") == [".ci/run"]
    assert commands("wheel") == ["make wheel"]
    assert "make test" in text(".ci/run")


def test_the_workflow_tries_every_python_from_the_least() -> None:
    for job in ("unit", "test"):
        pythons = WORKFLOW["jobs"][job]["strategy"]["matrix"]["python"]
        assert pythons == ["3.11", "3.12", "3.13"]
        assert WORKFLOW["jobs"][job]["env"]["PYTHON"] == "python${{ matrix.python }}"
    least = tomllib.loads(text("pyproject.toml"))["project"]["requires-python"]
    assert least == ">=3.11"


@pytest.mark.parametrize("page", PAGES)
def test_the_make_targets_that_a_page_names_are_there(page: str) -> None:
    code = re.findall(r"`([^`]+)`|^ {4}(.+)$", text(page), re.MULTILINE)
    named = re.findall(r"\bmake ([a-z][a-z-]*)", "\n".join("".join(words) for words in code))
    assert set(named) <= TARGETS


def test_pre_commit_runs_the_environment_s_own_tools() -> None:
    hooks = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    assert all(hook["entry"].startswith(".venv/bin/") for hook in hooks)
    for path in re.findall(r"\btests/\S+", " ".join(hook["entry"] for hook in hooks)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("part", PARTS)
def test_each_package_says_that_it_is_typed(part: str) -> None:
    assert (ROOT / part / "py.typed").exists()
    data = tomllib.loads(text("pyproject.toml"))["tool"]["setuptools"]["package-data"]
    assert "py.typed" in data["*"]
