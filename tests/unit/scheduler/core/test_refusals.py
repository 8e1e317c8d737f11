"""The scheduler's core: which models are refused, with which words, and until when."""

from __future__ import annotations

import pytest

from scheduler.state import messages as m
from tests.kits.scheduler_world import GIB, FakeNode, World, one_gpu, spec


def test_what_can_never_fit_is_refused_with_the_reason() -> None:
    world = World(one_gpu())
    world.put(spec("a", 30))
    assert "needs 30.0 GiB on one device; the most any device could give is 24.0 GiB" in (
        world.route("a").refusal
    )
    assert "max_model_len" not in world.route("a").refusal  # its size is declared
    world.put(spec("b", 40, tensor_parallel_size=2))
    assert "needs 2 devices on one node; the largest node has 1" in world.route("b").refusal
    world.nodes["n2"] = FakeNode("n2", {"g0": 24 * GIB, "g1": 24 * GIB})
    world.nodes["n2"].devices["big"] = 40 * GIB
    world.run(2)
    assert world.route("a").refusal is None  # a larger node came: no restart needed
    assert world.route("b").refusal is None


def test_a_refusal_that_waiting_cannot_change_is_final_and_says_no_time() -> None:
    world = World(one_gpu())
    world.put(spec("huge", 80))
    route = world.route("huge")
    assert (route.refusal is not None, route.refusal_final, route.retry_after_s) == (
        True, True, None,
    )  # fmt: skip


@pytest.mark.parametrize("why", ["down", "cordoned", "foreign"])
def test_a_refusal_that_passes_once_a_known_node_is_free_again_is_not_final(why: str) -> None:
    large = FakeNode("n2", {"g0": 100 * GIB})
    world = World(one_gpu(), large)
    if why == "down":
        large.up = False
    elif why == "cordoned":
        world.apply(m.CordonSet(now=world.now, node_id="n2", cordoned=True))
    else:
        large.foreign["g0"] = 60 * GIB
    world.run(60)
    world.put(spec("huge", 80))
    route = world.route("huge")
    assert (route.refusal is not None, route.refusal_final, route.retry_after_s) == (
        True, False, 30.0,
    )  # fmt: skip


def test_the_vllm_engine_is_never_placed_on_simulated_devices() -> None:
    node = one_gpu()
    world = World(node)
    world.put(spec("a").__class__(name="a", source="/m", engine="vllm", device_memory_bytes=GIB))
    assert "no node can run the engine 'vllm'" in world.route("a").refusal


def test_memory_that_others_hold_is_not_given_away() -> None:
    node = one_gpu()
    node.foreign = {"g0": 20 * GIB}
    world = World(node)
    world.put(spec("a", 8))
    assert "the most any device could give is 4.0 GiB" in world.route("a").refusal


def test_a_failed_start_is_reported_rests_and_is_tried_again() -> None:
    node = one_gpu()
    node.fails = {"a": "the model folder /models/x does not exist"}
    world = World(node)
    world.put(spec("a"))
    world.want("a")
    world.run(4)
    route = world.route("a")
    assert route.refusal == "it did not start: the model folder /models/x does not exist"
    assert 5 < route.retry_after_s <= 10
    assert route.warmth == "failed"
    world.run(2)
    assert not world.core.state.replicas  # cleared away
    node.fails = {}
    world.run(10)
    assert world.route("a").refusal is None
    world.want("a")
    world.run(4)
    assert world.hot() == {"a"}


def test_an_operators_load_starts_a_model_that_rests_after_a_failure() -> None:
    node = one_gpu()
    node.fails = {"a": "boom"}
    world = World(node)
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    node.fails = {}
    world.apply(m.LoadAsked(now=world.now, model="a"))
    world.run(4)
    assert world.hot() == {"a"}


def test_a_final_failure_is_told_as_final_and_one_that_may_pass_is_not() -> None:
    for kind, final in (("bad_model", True), ("too_small", True), ("oom", False)):
        node = one_gpu()
        node.fails, node.fail_kind = {"c": "the weights are no good"}, kind
        world = World(node)
        world.put(spec("c", 10))
        world.want("c")
        world.run(5)
        route = world.route("c")
        assert route.refusal == "it did not start: the weights are no good"
        assert (route.refusal_final, route.retry_after_s is None) == (final, final)
        world.put(spec("c", 9))
        assert not world.route("c").refusal
