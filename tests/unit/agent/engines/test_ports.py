"""The ports that a node's engines get: any free one, or only those of agent.engine_ports."""

from __future__ import annotations

import socket

import pytest

from agent.engines.ports import NoFreePort, Ports, free_port
from runtime.contract.config import AgentConfig, load
from runtime.contract.schema import SchemaError
from tests.kits.port_ranges import HOST, free_range, listening


def test_without_a_range_it_is_any_free_port_and_never_one_given_before():
    port = free_port(HOST, ())
    with socket.socket() as listener:
        listener.bind((HOST, port))
    assert free_port(HOST, range(port, port + 5)) not in range(port, port + 5)
    ports = Ports()
    given = [ports.take(f"m-{number}", HOST) for number in range(50)]
    assert len(set(given)) == 50


def test_starts_at_once_get_every_port_of_the_range_once():
    allowed = free_range(4)
    ports = Ports(allowed)
    given = [ports.take(f"m-{number}", HOST) for number in range(4)]
    assert sorted(given) == list(allowed)


def test_a_full_range_is_said_with_the_setting_and_the_fix():
    allowed = free_range(2)
    ports = Ports(allowed)
    ports.take("m-1", HOST)
    with listening(allowed[1]), pytest.raises(NoFreePort) as refused:
        ports.take("m-2", HOST)
    said = str(refused.value)
    assert f"agent.engine_ports = '{allowed[0]}-{allowed[1]}'" in said
    assert "hold 1 of 2; set a wider range" in said
    assert ports.take("m-2", HOST) == allowed[1], "the other program left"


def test_a_port_comes_back_when_its_engine_is_gone_or_starts_again():
    allowed = free_range(1)
    ports = Ports(allowed)
    for _ in range(3):
        assert ports.take("m-1", HOST) == allowed[0]
    ports.give_back("m-1")
    ports.give_back("never had one")
    assert ports.take("m-2", HOST) == allowed[0]


def test_a_port_rests_before_it_is_another_engines():
    allowed = free_range(3)
    ports = Ports(allowed)
    given = []
    for number in range(3):
        given.append(ports.take(f"m-{number}", HOST))
        ports.give_back(f"m-{number}")
    assert sorted(given) == list(allowed)


def test_the_port_of_an_adopted_engine_is_not_given_though_nothing_listens_there_yet():
    allowed = free_range(2)
    ports = Ports(allowed)
    ports.keep("m-1", allowed[0])
    assert ports.take("m-2", HOST) == allowed[1]
    with pytest.raises(NoFreePort):
        ports.take("m-3", HOST)


def test_what_stokers_own_parts_listen_on_is_never_given():
    allowed = free_range(3)
    ports = Ports(allowed, never=(allowed[0], allowed[2]))
    assert ports.take("m-1", HOST) == allowed[1]


def test_an_ended_engines_connections_do_not_keep_its_port():
    allowed = free_range(1)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, allowed[0]))
        listener.listen()
        with socket.create_connection((HOST, allowed[0])) as caller:
            served, _ = listener.accept()
            served.close()  # first: its end waits for a minute now (TIME_WAIT)
            caller.recv(1)
    assert Ports(allowed).take("m-1", HOST) == allowed[0]


def test_a_port_that_another_program_has_bound_but_not_listens_on_yet_is_not_free():
    """vLLM binds its port before it loads the model, so that others still can: of two engines the
    second one fails once its model is loaded, or gets half of the first one's connections."""
    allowed = free_range(2)
    with socket.socket() as loading:
        loading.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        loading.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        loading.bind((HOST, allowed[0]))
        assert Ports(allowed).take("m-1", HOST) == allowed[1]


def test_an_address_of_another_machine_is_an_error_not_a_full_range():
    with pytest.raises(OSError, match="annot assign requested address"):
        Ports(range(21000, 21002)).take("m-1", "192.0.2.1")


def test_the_setting_is_read_from_the_environment():
    config = load(environ={"STOKER_AGENT_ENGINE_PORTS": "20000-20999"})
    assert config.agent.engine_port_range() == range(20000, 21000)
    assert load(environ={}).agent.engine_port_range() is None
    assert AgentConfig(engine_ports="5000-5000").engine_port_range() == range(5000, 5001)


@pytest.mark.parametrize(
    "text",
    [
        "20000",
        "20999-20000",
        "80-90",
        "20000-70000",
        "20000:20999",
        "a-b",
        "-1-5",
        "٢٠٠٠-٢٩٩٩",
        "20000-",
    ],
)
def test_a_malformed_range_is_refused_with_its_key_value_and_the_fix(text):
    with pytest.raises(SchemaError) as refused:
        load(environ={"STOKER_AGENT_ENGINE_PORTS": text})
    said = str(refused.value)
    assert f"agent.engine_ports: is not a range of ports (got {text!r})" in said
    assert "from 1024 to 65535, e.g. '20000-20999'" in said
