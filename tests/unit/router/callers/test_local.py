"""Who calls from this host, and who only looks as if."""

from __future__ import annotations

import pytest

from runtime.router.callers.local import Local


def problem(*allowed: str, host: str = "127.0.0.1:8080", **headers: str) -> str | None:
    given = [(b"Host", host.encode())]
    given += [(n.replace("_", "-").encode(), v.encode()) for n, v in headers.items()]
    return Local(allowed).problem(given)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.9.9.9:1", "localhost:8080", "LOCALHOST", "a.localhost", "[::1]:80"]
)
def test_names_of_this_host(host: str) -> None:
    assert problem(host=host) is None
    assert problem(host=host, Origin=f"http://{host}") is None


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "",
        "[::2]", "0x7f000001", "127.1", "notlocalhost",
    ],
)  # fmt: skip
def test_a_name_of_another_site_leads_nowhere(host: str) -> None:
    assert "Host" in (problem(host=host) or "")
    assert "Host" in (problem(host=host) or "")  # nor a second time


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "", "http://[", "file://"])
def test_a_page_of_another_site_is_no_caller(origin: str) -> None:
    assert "Origin" in (problem(Origin=origin) or "")


@pytest.mark.parametrize("name", ["Forwarded", "X_Forwarded_For", "x_forwarded_proto", "X_Real_IP"])
def test_a_proxy_speaks_for_others(name: str) -> None:
    assert "proxy" in (problem(**{name: "10.1.2.3"}) or "")


def test_names_that_the_operator_allows() -> None:
    assert problem("dev.example", host="DEV.example:80", Origin="http://dev.example") is None
