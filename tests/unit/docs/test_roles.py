"""Each Ansible role says what it is for and what its variables mean."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.kits.checkout import ROOT

ROLES = sorted(path.name for path in (ROOT / "ansible/roles").iterdir())
DEFAULTS = sorted(ROOT.glob("ansible/roles/*/defaults/main.yml"))


def specs(role: str) -> dict[str, Any]:
    text = (ROOT / "ansible/roles" / role / "meta/argument_specs.yml").read_text("utf-8")
    return yaml.safe_load(text)["argument_specs"]


@pytest.mark.parametrize("role", ROLES)
def test_a_role_has_a_readme_and_says_what_its_variables_are(role: str) -> None:
    assert (ROOT / "ansible/roles" / role / "README.md").exists()
    assert specs(role)["main"]["short_description"]
    for name, option in specs(role)["main"]["options"].items():
        assert option["description"], name
        assert option["type"], name


@pytest.mark.parametrize("path", DEFAULTS, ids=lambda path: path.parts[-3])
def test_every_variable_with_a_default_is_described_and_no_other(path: Any) -> None:
    options = set(specs(path.parts[-3])["main"]["options"])
    assert options - {"stoker_cluster_token"} == set(yaml.safe_load(path.read_text("utf-8")))


@pytest.mark.parametrize("role", ROLES)
def test_secrets_are_not_shown(role: str) -> None:
    for name, option in specs(role)["main"]["options"].items():
        secret = name.endswith(("_token", "_key"))
        assert option.get("no_log", False) == secret, name
