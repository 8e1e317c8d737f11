"""Typed configuration: one TOML file and the environment, parsed once; errors name the key.

`[scheduler] port = 8081` in the file and `STOKER_SCHEDULER_PORT=8081` in the environment are the
same setting; the environment wins.
"""

from __future__ import annotations

import os
import re
import socket
import tomllib
import typing
from collections.abc import Iterator, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from runtime.checkpoints.model_files import CacheConfig
from runtime.contract.engine_policy import ENGINE_ENV
from runtime.contract.schema import SchemaError, check, close_names
from runtime.wire.agent_messages import SpecProblem
from runtime.wire.names import NODE_PATTERN

MIN_SECRET_CHARS = 16
MIN_ENGINE_PORT = 1024  # below, a port takes root
MAX_PORT = 65535
DEFAULT_FILE = "/etc/stoker/stoker.toml"

Port = Annotated[int, Meta(ge=0, le=65535, description="a TCP port; 0 picks a free one")]
Seconds = Annotated[float, Meta(gt=0, description="seconds, more than 0")]


class RegistryConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where shared state lives: a Consul server, or (no URL) a file for a single host."""

    consul_url: str | None = None  # e.g. http://127.0.0.1:8500
    consul_token: str | None = None
    file: str = ""  # embedded registry; default <state_dir>/registry.db
    prefix: str = "stoker"


class RouterConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The front door."""

    host: str = "127.0.0.1"
    port: Port = 8080
    advertise_host: str | None = None  # what others reach it by; default: host
    max_body_bytes: Annotated[int, Meta(gt=0)] = 32 * 2**20
    heartbeat_s: Seconds = 5.0  # between SSE comments while a streaming call is held
    connect_timeout_s: Seconds = 5.0  # to an engine; then another replica is tried
    first_byte_timeout_s: Seconds = 600.0  # a whole answer, if it is not streamed: then 504
    idle_timeout_s: Seconds = 300.0  # between two pieces of a stream; then it is broken off
    total_timeout_s: Seconds = 3600.0  # for a whole answer
    # For a request to arrive, or a caller to read anything. Idle connections are closed then, if
    # not before: a proxy in front has to close them first (nginx after 60 s), or calls are lost.
    read_timeout_s: Seconds = 75.0
    max_connections: Annotated[int, Meta(gt=0)] = 10_000  # of one worker
    max_in_flight: Annotated[
        int, Meta(gt=0, description="requests sent to one replica at a time; more wait here")
    ] = 1024
    workers: Annotated[
        int, Meta(ge=1, le=256, description="processes that share the port (SO_REUSEPORT)")
    ] = 1
    drain_s: Seconds = 30.0
    anonymous: Annotated[
        Literal["auto", "on", "off"],
        Meta(
            description="callers without a key: auto lets them in on a loopback address only,"
            " from this host, until there is a key"
        ),
    ] = "auto"
    allowed_hosts: Annotated[
        tuple[str, ...],
        Meta(description="names beside localhost by which this host's callers without a key call"),
    ] = ()

    trusted_proxies: Annotated[
        tuple[str, ...],
        Meta(
            description="addresses or networks of proxies in front, whose X-Forwarded-For says"
            " who calls; for the access log and traces"
        ),
    ] = ()

    held_bytes: Annotated[
        int, Meta(gt=0, description="memory of one worker for what callers sent; then 503")
    ] = 512 * 2**20
    cache_bytes: Annotated[
        int, Meta(ge=0, description="memory of one worker for kept answers (response_cache)")
    ] = 64 * 2**20
    cors_origins: Annotated[
        tuple[str, ...],
        Meta(
            description="web pages that may call from a browser, e.g. https://chat.example.com;"
            " '*': all; left out: none"
        ),
    ] = ()
    access_log: Annotated[
        str, Meta(description="a file for one JSON line a call; '-': standard output; '': none")
    ] = ""
    otlp_endpoint: Annotated[
        str,
        Meta(description="where traces go (OTLP/HTTP), e.g. http://collector:4318; '': none"),
    ] = ""
    trace_sample: Annotated[
        float, Meta(ge=0, le=1, description="share of the calls without a traceparent to trace")
    ] = 1.0
    batch_concurrency: Annotated[
        int, Meta(ge=1, le=1024, description="lines of batches sent by one host at a time")
    ] = 8
    batch_file_max_bytes: Annotated[int, Meta(gt=0)] = 200 * 2**20
    results_keep_s: Seconds = 7 * 24 * 3600.0  # files, batches and jobs, from when they are done
    store_max_bytes: Annotated[
        int, Meta(gt=0, description="of <state_dir>/jobs.db; then nothing more is taken in")
    ] = 10 * 2**30
    store_tenant_share: Annotated[
        float,
        Meta(gt=0, le=1, description="of store_max_bytes, for one tenant's files and jobs"),
    ] = 0.5
    jobs_per_tenant: Annotated[
        int, Meta(gt=0, description="jobs of one tenant that wait or run, webhooks included")
    ] = 10_000
    batches_per_tenant: Annotated[
        int, Meta(gt=0, description="batches of one tenant that have not ended")
    ] = 100
    # base64 of 24 bytes or more: the master of the tenants' keys; without one, no webhooks
    webhook_secret: str = ""
    webhook_private: Annotated[
        bool, Meta(description="webhooks may go to private addresses, and by http")
    ] = False

    def lets_anonymous_in(self) -> bool:
        """Whether callers without a key are served."""
        loopback = self.host == "localhost" or self.host.startswith("127.") or self.host == "::1"
        return self.anonymous == "on" or (self.anonymous == "auto" and loopback)


class SchedulerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The scheduler and its admin API."""

    host: str = "127.0.0.1"
    port: Port = 8081
    advertise_url: str | None = None
    node_timeout_s: Seconds = 10.0  # without a heartbeat, a node is lost
    recovery_grace_s: Seconds = 10.0  # after a restart: how long to wait for known nodes
    drain_grace_s: Seconds = 60.0  # how long in-flight requests may take when a replica stops
    min_dwell_s: Annotated[float, Meta(ge=0)] = 5.0  # a ready replica is not evicted sooner
    starts_at_once: Annotated[
        int, Meta(ge=1, le=8, description="starts on one device at once; 1: one after another")
    ] = 2
    shells: Annotated[
        bool,
        Meta(
            description="point an engine that runs at another model of its architecture, where that"
            " is quicker than a start"
        ),
    ] = True
    stand_by: Annotated[
        bool,
        Meta(
            description="start each new model once, into free room, and let it sleep or be staged"
        ),
    ] = False


class AgentConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The node agent."""

    node_id: Annotated[
        str, Meta(pattern=f"^$|{NODE_PATTERN}", description="default: the host's name")
    ] = ""
    host: str = "127.0.0.1"
    port: Port = 8082
    advertise_host: str | None = None  # what others reach this node by; default: host
    devices: Annotated[
        str,
        Meta(description="auto | nvml | cpu | cpu:SIZE | simulated:COUNTxSIZE (simulated:2x24GiB)"),
    ] = "auto"
    engine_ports: Annotated[
        str,
        Meta(description="engines listen on these ports only, e.g. '20000-20999'; '': on any"),
    ] = ""
    engine_python: str = ""  # the interpreter vLLM is installed in; default: this one
    model_dir: str = ""  # where downloaded models are kept; default <state_dir>/models
    start_timeout_s: Seconds = 900.0  # a start that takes longer has failed
    launcher: Annotated[
        bool, Meta(description="fork engines from a parent that imported them once (600 MB)")
    ] = True
    max_restarts: Annotated[int, Meta(ge=0)] = 3  # in a row, before the agent gives up
    heartbeat_s: Seconds = 1.0
    labels: dict[str, str] = {}
    engine_env: Annotated[
        tuple[str, ...],
        Meta(
            description="patterns of the environment variables that engines may get, of a spec's"
            " env and of the agent's own environment"
        ),
    ] = ENGINE_ENV
    media_domains: Annotated[
        tuple[str, ...],
        Meta(
            description="patterns of the hosts that a spec's media_domains may name, e.g."
            " '*.example.com'; an address must be written out; left out: none"
        ),
    ] = ()
    host_budget_bytes: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(
            description="at most so much host memory for sleeping engines and staged weights, e.g."
            " 200GiB; left out: what the host has, less host_reserve_bytes"
        ),
    ] = None
    host_reserve_bytes: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="host memory that is never booked, e.g. 8GiB; left out: a tenth"),
    ] = None
    preemptible: Annotated[
        bool, Meta(description="a spot machine, which may be taken away at short notice")
    ] = False
    preemption_file: Annotated[
        str,
        Meta(description="once this file is there the machine goes; it may hold seconds: '90'"),
    ] = ""
    preemption_url: Annotated[
        str,
        Meta(description="asked every 2 s: 200 means that the machine goes, 404 that it stays"),
    ] = ""
    preemption_grace_s: Annotated[
        float, Meta(gt=0, description="seconds left where a notice names none, e.g. 30")
    ] = 30.0

    def engine_port_range(self) -> range | None:
        """`engine_ports`; None: any. Raises SchemaError."""
        if not self.engine_ports:
            return None
        found = re.fullmatch(r"\s*(\d{1,5})\s*-\s*(\d{1,5})\s*", self.engine_ports, re.ASCII)
        first, last = map(int, found.groups()) if found else (0, 0)
        if not MIN_ENGINE_PORT <= first <= last <= MAX_PORT:
            problem = SpecProblem(
                field="agent.engine_ports",
                value=self.engine_ports,
                message="is not a range of ports",
                fix=f"write the first and the last, from {MIN_ENGINE_PORT} to {MAX_PORT}, e.g."
                " '20000-20999'",
            )
            raise SchemaError([problem], "config")
        return range(first, last + 1)


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything. `cluster_token` guards what the parts say to each other and the admin API."""

    state_dir: str = "/var/lib/stoker"
    cluster_token: str = ""
    metrics_token: Annotated[
        str, Meta(description="opens /metrics of every part and nothing else; for scrapers")
    ] = ""
    log_format: Literal["text", "json"] = "text"
    registry: RegistryConfig = RegistryConfig()
    router: RouterConfig = RouterConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    agent: AgentConfig = AgentConfig()
    cache: CacheConfig = CacheConfig()

    def registry_file(self) -> Path:
        """The embedded registry's file."""
        return Path(self.registry.file or Path(self.state_dir) / "registry.db")

    def node_id(self) -> str:
        """The name of this node in the cluster."""
        return self.agent.node_id or socket.gethostname()


_OWN_VARIABLES = {"STOKER_ROUTER_WORKER"}  # what the router tells its workers
_SECTIONS: dict[str, type[Struct]] = {
    "registry": RegistryConfig,
    "router": RouterConfig,
    "scheduler": SchedulerConfig,
    "agent": AgentConfig,
    "cache": CacheConfig,
}


def load(
    path: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """The file's settings, then the environment's, then `overrides` ({"router.port": 9000}).

    Without `path`, $STOKER_CONFIG or /etc/stoker/stoker.toml is read if it exists. Raises
    SchemaError naming each bad key, its value and the fix; OSError if a named file can't be read.
    """
    environ = os.environ if environ is None else environ
    raw = _read(path or environ.get("STOKER_CONFIG"))
    for key, value in [*_from_environ(environ), *(overrides or {}).items()]:
        section, dot, field = key.partition(".")
        if dot:
            raw.setdefault(section, {})[field] = value
        else:
            raw[section] = value
    if unknown := list(_unknown_variables(environ)):
        raise SchemaError(unknown, "config")
    config = check(raw, Config, "config")
    if problems := [*_weak("cluster_token", config), *_weak("metrics_token", config)]:
        raise SchemaError(problems, "config")
    if problems := list(_no_networks(config.router.trusted_proxies)):
        raise SchemaError(problems, "config")
    config.agent.engine_port_range()  # raises where it is invalid
    return config


def _no_networks(trusted: tuple[str, ...]) -> Iterator[SpecProblem]:
    for network in trusted:
        try:
            ip_network(network)
        except ValueError as error:
            fix = "write an address or a network, e.g. 10.0.0.0/8"
            yield SpecProblem(field="router.trusted_proxies", message=str(error), fix=fix)


def _weak(field: str, config: Config) -> Iterator[SpecProblem]:
    """Why a secret is invalid; the secret itself is not told."""
    secret: str = getattr(config, field)
    if not secret:
        return
    message = None
    if len(secret) < MIN_SECRET_CHARS:
        message = f"has {len(secret)} characters, fewer than {MIN_SECRET_CHARS}"
    elif not (secret.isascii() and secret.isprintable()) or secret != secret.strip():
        message = "can't be sent in a header: it has other characters than printable ASCII"
    if message:
        yield SpecProblem(field=field, message=message, fix="use e.g. `openssl rand -hex 32`")


def _read(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        if not Path(DEFAULT_FILE).exists():
            return {}
        path = DEFAULT_FILE
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        problem = SpecProblem(field=str(path), message=f"is not valid TOML: {error}")
        raise SchemaError([problem]) from None


def _from_environ(environ: Mapping[str, str]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    parts: list[tuple[str, type[Struct]]] = [("", Config), *_SECTIONS.items()]
    for section, kind in parts:
        for field in msgspec.structs.fields(kind):
            if not section and field.name in _SECTIONS:
                continue
            variable = "_".join(filter(None, ["STOKER", section, field.name])).upper()
            if variable in environ:
                key = f"{section}.{field.name}" if section else field.name
                found.append((key, _from_text(environ[variable], field.type)))
    return found


def _variables() -> set[str]:
    """Every environment variable that is a setting."""
    parts: list[tuple[str, type[Struct]]] = [("", Config), *_SECTIONS.items()]
    return {
        "_".join(filter(None, ["STOKER", section, field.name])).upper()
        for section, kind in parts
        for field in msgspec.structs.fields(kind)
    }


def _unknown_variables(environ: Mapping[str, str]) -> Iterator[SpecProblem]:
    """Problems of variables that begin as a section's setting and are unknown: left alone, they
    would vanish."""
    known = _variables()
    sections = tuple(f"STOKER_{section.upper()}_" for section in _SECTIONS)
    for name in sorted(environ):
        if name.startswith(sections) and name not in known | _OWN_VARIABLES:
            close = close_names(name, known)
            fix = f"did you mean {close[0]}?" if close else "unset it"
            yield SpecProblem(field=name, message="is not a setting", fix=fix)


def _from_text(text: str, kind: Any) -> Any:
    """An environment variable's text as the field's type, or as it is for `check` to refuse.

    A list is written with commas.
    """
    if typing.get_origin(typing.get_args(kind)[0] if typing.get_args(kind) else kind) is tuple:
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        return msgspec.convert(text, kind, strict=False)
    except msgspec.ValidationError:
        return text
