"""A real nginx in front of a router: as it is by default, and with docs/install.md's settings."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.kits.checkout import ROOT
from tests.kits.cluster import wait_until

_WORD = "proxy_read_timeout 1h;"  # of the documented settings, after which others may stand
_MAIN = """
daemon off;
{user}
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
access_log off;
{paths}
{servers}
}}
"""


class Fronts(NamedTuple):
    """The base URL of each way through."""

    default: str  # nothing but proxy_pass
    documented: str
    unbuffered: str  # as documented, and nothing is kept back in either direction
    impatient: str  # as by default, and an answer that says nothing for 2 s is given up
    certificate: str  # of those with TLS


def documented() -> str:
    """The settings in docs/install.md."""
    lines = (ROOT / "docs" / "install.md").read_text().split("\n")
    first = lines.index("    upstream stoker {")
    last = next(n for n, line in enumerate(lines) if n > first and line[:4].strip())
    return "\n".join(line[4:] for line in lines[first:last])


@contextmanager
def in_front_of(router: str, folder: Path) -> Iterator[Fronts]:
    """Run nginx; skips the test where there is none."""
    program, openssl = _program("nginx", "nginx-light"), _program("openssl", "openssl")
    ports = _free_ports(4)
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
            "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
            "-keyout", str(key), "-out", str(certificate),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    settings = documented()
    for ours, here in (
        ("127.0.0.1:8080", router.removeprefix("http://")),
        ("listen 443 ssl", f"listen 127.0.0.1:{ports[1]} ssl"),
        ("/etc/ssl/llm.example.com.pem", str(certificate)),
        ("/etc/ssl/llm.example.com.key", str(key)),
    ):
        assert settings.count(ours) == 1, f"docs/install.md has {ours!r} once"
        settings = settings.replace(ours, here)
    server = settings[settings.index("server {\n    listen") :]
    unbuffered = server.replace(f"127.0.0.1:{ports[1]} ", f"127.0.0.1:{ports[2]} ")
    assert _WORD in unbuffered
    unbuffered = unbuffered.replace(
        _WORD, f"{_WORD} proxy_buffering off; proxy_request_buffering off;"
    )
    servers = [_plain(ports[0], router), settings, unbuffered]
    servers.append(_plain(ports[3], router, "proxy_read_timeout 2s;"))
    temporary = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    text = _MAIN.format(
        user="user root;" if os.geteuid() == 0 else "",
        folder=folder,
        paths="\n".join(f"{name}_temp_path {folder}/{name};" for name in temporary),
        servers="\n".join(servers),
    )
    (folder / "nginx.conf").write_text(text)
    with (folder / "nginx.log").open("w") as log:
        argv = [program, "-p", str(folder), "-c", str(folder / "nginx.conf")]
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        wait_until(lambda: process.poll() is not None or _listens(ports[3]), "nginx listens")
        assert process.poll() is None, (folder / "nginx.log").read_text()
        bases = [f"http{'s' * (n in (1, 2))}://127.0.0.1:{port}" for n, port in enumerate(ports)]
        yield Fronts(bases[0], bases[1], bases[2], bases[3], str(certificate))
    finally:
        process.terminate()
        process.wait(30)


def _plain(port: int, router: str, *more: str) -> str:
    """A server as most begin with."""
    location = " ".join((f"proxy_pass {router};", *more))
    return f"server {{ listen 127.0.0.1:{port}; location / {{ {location} }} }}"


def _program(name: str, package: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        pytest.skip(f"there is no {name} on this host (Debian: apt-get install {package})")
    return found


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
