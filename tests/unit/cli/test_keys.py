"""`stoker key` and `stoker tenant`: what they say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.contract.access import Limits, Scope
from scheduler.admin.handlers.access_api import KeyView, NewKey
from tests.kits.cli_runner import FakeServer, serving, stoker

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def webhook_key(tmp_path: Path, router: str, tenant: str) -> tuple[int, str]:
    config = tmp_path / "stoker.toml"
    config.write_text(f"[router]\n{router}\n")
    done = stoker(None, "--config", str(config), "tenant", "webhook-key", tenant)
    return done.exit_code, done.output


def test_a_tenants_webhook_key_comes_from_the_routers_config(tmp_path: Path) -> None:
    status, output = webhook_key(tmp_path, f'webhook_secret = "{SECRET}"', "acme")
    assert (status, output) == (0, "whsec_PHlzxtWnAfII0EtxAi1ksdz+dLLJKNp83B2Ck839Zdc=\n")
    assert webhook_key(tmp_path, f'webhook_secret = "{SECRET}"', "globex")[1] != output


@pytest.mark.parametrize(
    ("router", "tenant", "said"),
    [
        ("", "acme", "no router.webhook_secret"),
        ('webhook_secret = "hunter2"', "acme", "router.webhook_secret must be base64"),
        (f'webhook_secret = "{SECRET}"', "no spaces", "'no spaces' is not a tenant's name"),
    ],
)
def test_a_webhook_key_that_cannot_be_is_told(
    tmp_path: Path, router: str, tenant: str, said: str
) -> None:
    status, output = webhook_key(tmp_path, router, tenant)
    assert status != 0
    assert said in output
    assert "hunter2" not in output


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving() as made:
        yield made


@pytest.mark.parametrize("first", [True, False])
def test_whoever_makes_the_first_key_hears_whom_it_shuts_out(fake: FakeServer, first: bool) -> None:
    view = KeyView(
        key_id="aaaaaaaaaa", tenant="acme", note="", scope=Scope(), limits=Limits(),
        priority=None, created_at=0.0, expires_at=None, rotated_until=None,
    )  # fmt: skip
    fake.replies["POST /admin/keys"] = (201, NewKey(key=view, token="sk-x", first=first))
    done = stoker(fake, "key", "create", "acme")
    assert (done.exit_code, done.stdout) == (0, "sk-x\n")
    assert ("calls without one are refused from now on" in done.stderr) == first
    assert ('router.anonymous = "on"' in done.stderr) == first
