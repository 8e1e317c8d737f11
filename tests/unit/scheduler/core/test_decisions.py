"""The scheduler's core, one rule a test, on the event sequence that shows it."""

from __future__ import annotations

import pytest

from runtime.wire.agent_messages import StartReplica, StopReplica
from runtime.wire.routes import DemandReport, ModelDemand
from scheduler.admin import view_builders
from scheduler.state import messages as m
from scheduler.state.cluster import Replica, Stage
from tests.kits.scheduler_world import GIB, FakeNode, World, spec


def one_gpu(gib: int = 24) -> FakeNode:
    return FakeNode("n1", {"g0": gib * GIB})


def test_one_waiting_request_starts_one_replica_and_routes_to_it() -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    world.want("a", 200)
    assert world.route("a").waiting_for == "starting on n1 (g0)"
    world.run(4)
    assert world.hot() == {"a"}
    assert world.nodes["n1"].started == ["a-1-1"]  # 200 requests, one start


def test_routers_are_told_at_once_of_what_their_part_of_the_spec_says() -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    world.want("a")
    world.run(4)
    assert world.route("a").affinity == "prefix"
    world.put(spec("a", affinity="off", max_queue=7))
    assert (world.route("a").affinity, world.route("a").max_queue) == ("off", 7)
    assert world.nodes["n1"].started == ["a-1-1"]


def test_a_new_leader_publishes_even_an_empty_table() -> None:
    world = World(one_gpu())
    assert world.table is not None
    assert world.table.models == ()


def test_a_third_model_takes_the_place_of_the_coldest() -> None:
    world = World(one_gpu())
    world.put(spec("a", 10), spec("b", 10), spec("c", 10))
    world.want("a")
    world.run(5)
    world.want("b")
    world.run(5)
    assert world.hot() == {"a", "b"}
    world.want("c")
    world.run(6)
    assert world.hot() == {"b", "c"}
    evicted = [d for d in world.decided if d.action == "evict"]
    assert [(d.model, d.reason) for d in evicted] == [("a", "makes room for c")]
    assert evicted[0].cause == "1 request waiting"


def test_a_short_call_that_only_its_router_saw_counts_as_a_use() -> None:
    world = World(one_gpu())
    world.put(spec("a", 10), spec("b", 10), spec("c", 10))
    for name in ("a", "b"):
        world.want(name)
        world.run(5)
        (replica,) = world.core.state.models[name].ready()
        world.nodes["n1"].replicas[replica.replica_id].used_at = world.now
    world.run(5)
    # between two looks of its agent a is called once more: the router says so at once
    (replica,) = world.core.state.models["a"].ready()
    world.flying[replica.replica_id] = 1
    world.report()
    world.flying.clear()
    world.run(1)
    world.want("c")
    world.run(6)
    assert world.hot() == {"a", "c"}


def test_a_replica_with_work_in_flight_is_never_evicted() -> None:
    world = World(one_gpu())
    world.put(spec("a", 20), spec("b", 20))
    world.want("a")
    world.run(5)
    world.flying["a-1-1"] = 1
    world.run(1)
    world.want("b")
    world.run(30)
    assert world.hot() == {"a"}
    assert "a in use" in world.route("b").waiting_for
    world.flying.clear()
    world.run(6)
    assert world.hot() == {"b"}


def test_the_new_replica_is_not_started_before_the_memory_is_seen_free() -> None:
    node = one_gpu()
    node.stop_s = 7.0
    world = World(node)
    world.put(spec("a", 20), spec("b", 20))
    world.want("a")
    world.run(5)
    world.want("b")
    world.run(6)
    assert node.started == ["a-1-1"]
    assert world.route("b").waiting_for == "queued after a, which makes room on n1 (g0)"
    world.run(6)
    assert node.started == ["a-1-1", "b-1-2"]


def test_those_who_wait_are_told_after_whose_start_and_for_how_long() -> None:
    node = one_gpu()
    node.start_s = 10.0
    world = World(node)
    world.put(spec("a"), spec("b"), spec("c"))
    for name in ("b", "c", "a"):  # each is measured once
        world.want(name)
        world.run(13)
        world.want(name, 0)
        world.apply(m.UnloadAsked(now=world.now, model=name))
        world.run(5)
    assert not world.hot()
    for name in ("a", "b", "c"):
        world.want(name)
    world.run(2)
    assert world.route("a").waiting_for == "starting on n1 (g0)"
    assert world.route("b").waiting_for == "queued after the start of a on n1 (g0)"
    assert world.route("c").waiting_for == "queued after the start of a on n1 (g0)"
    assert world.route("b").eta_s > world.route("a").eta_s + 5
    world.run(10)
    told = {name: world.route(name).waiting_for for name in ("b", "c")}
    assert sorted(told.values()) in (
        ["queued after the start of b on n1 (g0)", "starting on n1 (g0)"],
        ["queued after the start of c on n1 (g0)", "starting on n1 (g0)"],
    )


def test_routers_are_told_why_an_engine_died_at_its_first_restart() -> None:
    node = one_gpu()
    world = World(node)
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    (replica,) = node.replicas.values()
    assert world.route("a").failures == {}
    replica.phase, replica.since = "starting", world.now
    replica.restarts, replica.reason = 1, "OutOfMemoryError: 2 GiB"
    world.run(1)
    assert world.route("a").failures == {"a-1-1": "OutOfMemoryError: 2 GiB"}
    assert "starting on n1 (g0) after it died: OutOfMemoryError" in world.route("a").waiting_for
    replica.phase, replica.reason = "ready", None
    world.run(1)
    assert world.route("a").failures == {}


def test_routers_confirm_before_a_replica_is_told_to_stop() -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    world.router_acks = False
    world.apply(m.UnloadAsked(now=world.now, model="a"))
    world.run(1)
    assert world.hot() == set()
    assert not [c for c in world.sent if isinstance(c, StopReplica)]
    world.router_acks = True
    world.run(1)
    assert [c for c in world.sent if isinstance(c, StopReplica)]


def test_a_dead_router_delays_a_stop_only_for_a_while() -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    world.router_acks = False
    world.apply(m.UnloadAsked(now=world.now, model="a"))
    world.run(8)
    assert not world.core.state.replicas


def test_idle_models_are_stopped_and_min_replicas_are_not() -> None:
    world = World(one_gpu())
    world.put(spec("a", 4, idle_s=10), spec("b", 4, idle_s=10, min_replicas=1))
    world.want("a")
    world.run(8)
    assert world.hot() == {"a", "b"}
    world.run(12)
    assert world.hot() == {"b"}
    assert ("stop", "a") in world.actions()


def test_starting_is_never_idle() -> None:
    node = one_gpu()
    node.start_s = 60
    world = World(node)
    world.put(spec("a", idle_s=1))
    world.want("a")
    world.run(30)
    world.waiting.clear()
    world.run(20)
    assert [r.stage for r in world.core.state.replicas.values()] == [Stage.STARTING]


def test_a_pinned_model_is_started_kept_and_never_evicted() -> None:
    world = World(one_gpu())
    world.put(spec("a", 20, idle_s=5), spec("b", 20))
    world.apply(m.PinSet(now=world.now, model="a", pinned=True))
    world.run(20)
    assert world.hot() == {"a"}
    world.want("b")
    world.run(20)
    assert world.hot() == {"a"}
    world.apply(m.PinSet(now=world.now, model="a", pinned=False))
    world.run(8)
    assert world.hot() == {"b"}


def test_concurrency_adds_replicas_up_to_the_maximum() -> None:
    world = World(FakeNode("n1", {f"g{i}": 24 * GIB for i in range(4)}))
    world.put(spec("a", 20, max_replicas=3, target_concurrency=10))
    world.want("a", 15)
    world.run(10)
    assert len(world.route("a").endpoints) == 2
    for replica in world.route("a").endpoints:
        world.flying[replica.replica_id] = 50
    world.run(10)
    assert len(world.route("a").endpoints) == 3


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


def test_tensor_parallel_takes_several_devices_of_one_node() -> None:
    world = World(
        FakeNode("n1", {"g0": 24 * GIB}), FakeNode("n2", {"g0": 24 * GIB, "g1": 24 * GIB})
    )
    world.put(spec("a", 40, tensor_parallel_size=2))
    world.want("a")
    world.run(5)
    (replica,) = world.core.state.replicas.values()
    assert (replica.node_id, replica.device_ids, replica.bytes) == ("n2", ("g0", "g1"), 20 * GIB)


def test_best_fit_keeps_large_holes_whole() -> None:
    world = World(FakeNode("n1", {"big": 80 * GIB, "small": 24 * GIB}))
    world.put(spec("a", 10), spec("b", 70))
    world.want("a")
    world.want("b")
    world.run(8)
    where = {r.model: r.device_ids for r in world.core.state.replicas.values()}
    assert where == {"a": ("small",), "b": ("big",)}


def test_memory_that_others_hold_is_not_given_away() -> None:
    node = one_gpu()
    node.foreign = {"g0": 20 * GIB}
    world = World(node)
    world.put(spec("a", 8))
    assert "the most any device could give is 4.0 GiB" in world.route("a").refusal


def test_one_start_at_a_time_per_device() -> None:
    world = World(one_gpu())
    world.put(spec("a", 4), spec("b", 4))
    world.want("a")
    world.want("b")
    assert len(world.nodes["n1"].started) == 1
    world.run(8)
    assert world.hot() == {"a", "b"}


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


def test_a_request_that_goes_away_cancels_a_plan_that_has_not_begun() -> None:
    node = one_gpu()
    node.stop_s = 5
    world = World(node)
    world.put(spec("a", 20), spec("b", 20))
    world.want("a")
    world.run(5)
    world.want("b")
    world.waiting.clear()
    world.run(10)
    assert node.started == ["a-1-1"]
    assert ("cancel", "b") in world.actions()


def test_a_spec_change_drops_no_replica_that_serves() -> None:
    world = World(one_gpu(48))
    world.put(spec("a", 20))
    world.want("a")
    world.run(5)
    world.flying["a-1-1"] = 3
    world.run(1)
    world.put(spec("a", 20, engine_args={"max_model_len": 10}))
    world.run(1)
    assert [e.replica_id for e in world.route("a").endpoints] == ["a-1-1"]
    world.run(6)  # the new one serves: the old one drains
    assert [e.replica_id for e in world.route("a").endpoints] == ["a-1-2"]
    assert world.core.state.replicas["a-1-1"].stage in (Stage.UNROUTING, Stage.STOPPING)


def test_without_room_for_both_an_outdated_replica_goes_when_idle() -> None:
    world = World(one_gpu())
    world.put(spec("a", 20))
    world.want("a")
    world.run(5)
    world.flying["a-1-1"] = 1
    world.run(1)
    world.put(spec("a", 20, engine_args={"max_model_len": 10}))
    world.run(20)
    assert world.hot() == {"a"}
    world.flying.clear()
    world.run(4)
    assert world.hot() == set()
    assert not world.core.state.replicas


def test_changing_what_no_process_sees_restarts_nothing() -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    world.put(spec("a", idle_s=9999, priority=3))
    world.run(5)
    assert world.nodes["n1"].started == ["a-1-1"]
    assert world.hot() == {"a"}


def test_removing_a_model_drains_it() -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    world.apply(m.ModelRemoved(now=world.now, name="a"))
    assert world.route("a") is None
    world.run(4)
    assert not world.core.state.replicas
    assert not world.nodes["n1"].replicas


def test_a_new_leader_adopts_what_runs_and_restarts_nothing() -> None:
    world = World(one_gpu())
    world.put(spec("a"), spec("b"))
    world.want("a")
    world.run(5)
    models = tuple(model.stored for model in world.core.state.models.values())
    before, table = list(world.nodes["n1"].started), world.table
    world.elect(models)
    world.run(10)
    assert world.nodes["n1"].started == before
    assert world.table.version > table.version
    assert world.hot() == {"a"}
    assert not [c for c in world.sent if isinstance(c, StopReplica)]


def test_a_recovering_leader_publishes_nothing_until_its_nodes_report() -> None:
    world = World(one_gpu(), recovery_grace_s=8.0)
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    models = tuple(model.stored for model in world.core.state.models.values())
    old = world.table
    world.nodes["n1"].up = False
    world.core.__init__(world.settings)
    world.term += 1
    world.apply(m.Elected(now=world.now, term=world.term, models=models, known_nodes=("n1",)))
    world.run(5)
    assert world.table is old  # routers keep their last table
    world.nodes["n1"].up = True
    world.run(2)
    assert world.hot() == {"a"}


def test_a_leader_stops_replicas_of_models_nobody_declares_any_more() -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    world.elect(())
    world.run(5)
    assert not world.nodes["n1"].replicas


def one_waits(world: World, model: str) -> None:
    """A router reports a caller that waits, although the table has an endpoint: it is of no use."""
    world.waiting[model] = 1
    world.router_seq += 1
    world.apply(
        m.DemandSeen(
            now=world.now,
            report=DemandReport(
                router_id="r", boot_id=1, seq=world.router_seq, routes_version=world.table.version,
                models=(ModelDemand(model=model, waiting=1),),
            ),
        )
    )  # fmt: skip


def lost_with_a() -> tuple[World, Replica]:
    """Two nodes, of which the one with `a` has not been heard of for 15 s."""
    world = World(one_gpu(), FakeNode("n2", {"g0": 24 * GIB}))
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    (replica,) = world.core.state.replicas.values()
    world.nodes[replica.node_id].up = False
    world.run(15)
    return world, replica


def test_a_lost_nodes_model_is_started_elsewhere_on_demand() -> None:
    world, replica = lost_with_a()
    assert replica.stage is Stage.UNKNOWN
    assert world.hot() == {"a"}  # it may well serve still: routers try, and report who waits
    one_waits(world, "a")
    world.run(5)
    other = {"n1", "n2"} - {replica.node_id}
    assert {r.node_id for r in world.core.state.models["a"].ready()} == other
    assert len(world.route("a").endpoints) == 1


def test_routers_are_told_where_the_engines_of_a_lost_node_were() -> None:
    """Those that serve, and one that left the table while a call was in flight there."""
    world = World(FakeNode("n1", {"g0": 24 * GIB}))
    world.put(spec("a"), spec("b"))
    world.want("a")
    world.want("b")
    world.run(5)
    assert world.table.lost == ()
    urls = {r.model: r.report.base_url for r in world.core.state.replicas.values()}
    (b,) = world.core.state.models["b"].replicas.values()
    world.flying[b.replica_id] = 1
    world.apply(m.ModelRemoved(now=world.now, name="b"))
    world.run(2)
    assert world.hot() == {"a"}
    for _ in range(2):  # a second loss is told as the first one was
        world.nodes["n1"].up = False
        world.run(15)
        assert world.table.lost == tuple(sorted(urls.values()))
        world.nodes["n1"].up = True
        world.run(2)
        assert world.table.lost == ()


def test_a_node_that_returns_is_adopted_again() -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    world.nodes["n1"].up = False
    world.run(15)
    world.nodes["n1"].up = True
    world.nodes["n1"].boot_id += 1
    world.nodes["n1"].seq = 0
    world.run(2)
    (replica,) = world.core.state.replicas.values()
    assert replica.stage is Stage.READY
    assert world.nodes["n1"].started == ["a-1-1"]


@pytest.mark.parametrize("elected", [False, True], ids=["same leader", "another leader"])
def test_a_node_that_returns_does_not_leave_more_than_max_replicas(elected: bool) -> None:
    """What was started elsewhere meanwhile stays; also if nobody calls, and a new leader adopts."""
    world, replica = lost_with_a()
    one_waits(world, "a")
    world.run(5)
    other = {"n1", "n2"} - {replica.node_id}
    assert {r.node_id for r in world.core.state.models["a"].ready()} == other
    world.nodes[replica.node_id].up = True
    if elected:
        world.elect((m.StoredModel(spec=spec("a")),))
    world.run(8)
    assert {name for name, node in world.nodes.items() if node.replicas} == other
    assert world.hot() == {"a"}


def test_a_lowered_max_replicas_is_kept_though_nobody_calls() -> None:
    world = World(one_gpu(), FakeNode("n2", {"g0": 24 * GIB}))
    world.put(spec("a", min_replicas=2, max_replicas=2))
    world.run(5)
    assert len(world.core.state.replicas) == 2
    world.put(spec("a"))
    world.run(8)
    assert len(world.core.state.replicas) == 1


def test_cordon_drain_uncordon() -> None:
    world = World(one_gpu(), FakeNode("n2", {"g0": 24 * GIB}))
    world.put(spec("a", min_replicas=1))
    world.run(5)
    (replica,) = world.core.state.replicas.values()
    first = replica.node_id
    world.apply(m.CordonSet(now=world.now, node_id=first, cordoned=True, drain=True))
    world.run(8)
    assert not world.nodes[first].replicas
    assert {r.node_id for r in world.core.state.replicas.values()} == {"n1", "n2"} - {first}
    world.apply(m.CordonSet(now=world.now, node_id=first, cordoned=False))
    assert world.core.state.nodes[first].schedulable


def test_the_coldest_is_told_by_when_requests_ended_not_by_when_it_was_heard() -> None:
    world = World(one_gpu())
    world.put(spec("a", 10), spec("b", 10), spec("c", 10))
    world.want("a")
    world.run(5)
    world.want("b")
    world.run(5)
    a, b = world.nodes["n1"].replicas["a-1-1"], world.nodes["n1"].replicas["b-1-2"]
    ended = world.now
    world.flying["b-1-2"] = 1  # heard as in flight for a while after it has ended
    world.run(1)
    world.flying.clear()
    a.used_at, b.used_at = ended + 0.2, ended + 0.1
    world.used |= {"a-1-1": ended + 0.2, "b-1-2": ended + 0.1}
    world.run(1)
    world.want("c")
    world.run(6)
    assert world.hot() == {"a", "c"}


def hot_pair_and_a_failing_third(kind: str) -> World:
    """a and b are called every second; c is called all the time, and its first start fails."""
    node = one_gpu()
    node.fails, node.fail_kind = {"c": "the weights are no good"}, kind
    world = World(node)
    world.put(spec("a", 10), spec("b", 10), spec("c", 10))
    for name in "ab":
        world.want(name)
        world.run(5)
    for _ in range(120):
        for name in "abc":
            world.want(name)
        for route in map(world.route, "ab"):
            if route.endpoints:
                world.used[route.endpoints[0].replica_id] = world.now
        world.run(1)
    return world


@pytest.mark.parametrize("kind", ["bad_model", "oom"])
def test_a_model_that_cannot_start_takes_the_place_of_one_in_use_only_once(kind: str) -> None:
    world = hot_pair_and_a_failing_third(kind)
    evicted = [d.model for d in world.decided if d.reason == "makes room for c"]
    assert len(evicted) == 1
    assert world.hot() == {"a", "b"}
    assert world.core.state.models["c"].failures == 1


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


def test_a_failure_that_passed_lets_the_model_take_the_place_of_what_is_idle() -> None:
    node = one_gpu()
    node.fails, node.fail_kind = {"c": "a neighbour took the memory"}, "oom"
    world = World(node)
    world.put(spec("a", 10), spec("b", 10), spec("c", 10))
    for name in "ab":
        world.want(name)
        world.run(5)
    world.want("c")
    world.run(5)
    node.fails = {}
    world.run(10)
    for name in "ab":
        world.want(name)
        world.run(5)
    world.want("c")
    world.run(30)
    assert "c" in world.hot()


def test_why_an_engine_died_is_told_at_its_first_death() -> None:
    node = one_gpu()
    world = World(node)
    world.put(spec("a", 10))
    world.want("a")
    world.run(5)
    replica = node.replicas["a-1-1"]
    replica.phase, replica.since, replica.restarts = "starting", world.now, 1
    replica.died = replica.reason = "CUDA error: an illegal memory access was encountered"
    world.run(0.5)
    assert [(d.action, d.reason) for d in world.decided[-1:]] == [("die", replica.died)]
    assert "illegal memory access" in (world.route("a").waiting_for or "")
    replica.reason = None
    world.run(5)
    shown = view_builders.replica(world.core, world.core.state.replicas["a-1-1"], world.now)
    assert shown.died == replica.died
    assert [d.action for d in world.decided].count("die") == 1


@pytest.mark.parametrize("size", [10, 20])
def test_a_start_that_nobody_waits_for_gives_way_at_once(size: int) -> None:
    """With room for both the second waits for its turn, without for the first one's memory."""
    node = one_gpu()
    node.start_s = 25.0
    world = World(node)
    world.put(spec("slow", size), spec("next", size))
    world.want("slow")
    world.run(2)
    world.waiting.clear()  # its caller hangs up
    world.report()
    assert "slow-1-1" in node.replicas
    node.start_s = 1.0
    node.replicas["slow-1-1"].since = world.now + 25.0
    world.want("next")
    world.run(4)
    assert world.hot() == {"next"}
    assert "slow-1-1" not in node.replicas


def test_a_start_that_somebody_waits_for_keeps_its_turn() -> None:
    node = one_gpu()
    node.start_s = 5.0
    world = World(node)
    world.put(spec("slow", 10), spec("next", 10))
    world.want("slow")
    world.run(2)
    world.want("next")
    world.run(5)
    assert "slow" in world.hot()
    world.run(10)
    assert world.hot() == {"slow", "next"}


def told(world: World, seq: int, sent_s: float, **used_at: float) -> None:
    """A report of another router that was made at `sent_s` by its clock, and is heard now."""
    report = DemandReport(
        router_id="far", boot_id=1, seq=seq, routes_version=2**60, sent_s=sent_s,
        idle_s={f"{name[0]}-1-{name[1]}": sent_s - at for name, at in used_at.items()},
    )  # fmt: skip
    world.apply(m.DemandSeen(now=world.now, report=report))


@pytest.mark.parametrize(("first", "second"), [("a1", "b2"), ("b2", "a1")])
@pytest.mark.parametrize("late_s", [0.0, 0.9])
@pytest.mark.parametrize("stale", [False, True])
def test_two_short_calls_100_ms_apart_keep_their_order(
    first: str, second: str, late_s: float, stale: bool
) -> None:
    """Neither was ever in flight when anyone reported, and the first is told of late.

    `stale`: the first one's engine was asked meanwhile, and its answer came late too.
    """
    world = World(one_gpu())
    world.put(spec("a", 10), spec("b", 10), spec("c", 10))
    for name in "ab":
        world.want(name)
        world.run(5)
    clock_s = world.now - 77.0  # the router's own
    told(world, 1, clock_s)
    world.run(1)
    world.now += late_s
    told(world, 2, clock_s + 1.0, **{first: clock_s + 0.9})
    if stale:
        node = world.nodes["n1"]
        node.replicas[f"{first[0]}-1-{first[1]}"].used_at = world.now
        world.apply(m.HeartbeatSeen(now=world.now, heartbeat=node.heartbeat(world.now)))
    world.now = max(world.now, 77.0 + clock_s + 1.01)
    told(world, 3, clock_s + 1.01, **{first: clock_s + 0.9, second: clock_s + 1.0})
    world.want("c")
    world.run(6)
    assert world.hot() == {"c", second[0]}


def test_what_a_router_that_is_gone_told_stays_true() -> None:
    world = World(one_gpu())
    world.put(spec("a", 10))
    world.want("a")
    world.run(5)
    told(world, 1, 50.0, a1=50.0)
    at = world.now
    world.run(10)
    assert "far" not in world.core.state.routers
    replica = world.core.state.replicas["a-1-1"]
    assert replica.used_at == at
    assert list(replica.routed_at) == [""]


def test_the_engine_tells_of_uses_that_no_router_knows_of() -> None:
    world = World(one_gpu())
    world.put(spec("a", 10))
    world.want("a")
    world.run(5)
    told(world, 1, 50.0, a1=40.0)
    world.nodes["n1"].replicas["a-1-1"].used_at = world.now
    at = world.now
    world.run(3)
    assert world.core.state.replicas["a-1-1"].used_at == at


def test_an_old_heartbeat_is_dropped() -> None:
    world = World(one_gpu())
    old = world.nodes["n1"].heartbeat(world.now)
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    world.apply(m.HeartbeatSeen(now=world.now, heartbeat=old))
    assert world.hot() == {"a"}


def test_lower_priority_goes_first() -> None:
    world = World(one_gpu())
    world.put(spec("a", 10, priority=5), spec("b", 10), spec("c", 10))
    world.want("a")
    world.run(5)
    world.want("b")
    world.run(5)
    world.want("c")
    world.run(6)
    assert world.hot() == {"a", "c"}  # a is colder, but b matters less


def test_the_evicted_set_is_minimal() -> None:
    world = World(one_gpu(24))
    world.put(spec("a", 4), spec("b", 4), spec("c", 16), spec("d", 16))
    for name in "abc":
        world.want(name)
        world.run(5)
    world.want("d")
    world.run(8)
    assert world.hot() == {"a", "b", "d"}  # a and b are colder, but too small to help


def test_commands_carry_the_term_and_the_cause() -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    world.want("a", 2)
    (start,) = [c for c in world.sent if isinstance(c, StartReplica)]
    assert (start.epoch, start.reason, start.cause) == (1, "best fit", "2 requests waiting")


@pytest.mark.parametrize("kind", ["start", "stop"])
def test_a_command_whose_effect_is_not_seen_is_repeated(kind: str) -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    if kind == "stop":
        world.want("a")
        world.run(5)
    node = world.nodes["n1"]
    obey, node.obey = node.obey, lambda command, now: None
    world.__dict__["_deliver"] = lambda send: None  # neither the command nor its answer arrives
    if kind == "start":
        world.want("a")
    else:
        world.apply(m.UnloadAsked(now=world.now, model="a"))
    world.run(2)
    node.obey = obey
    del world.__dict__["_deliver"]
    world.run(6)
    assert world.hot() == ({"a"} if kind == "start" else set())
    assert bool(node.replicas) is (kind == "start")


def test_an_unload_is_not_undone_by_the_requests_that_the_replica_is_finishing() -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    world.flying["a-1-1"] = 1
    world.run(1)
    world.apply(m.UnloadAsked(now=world.now, model="a"))
    world.run(5)
    world.flying.clear()
    world.run(5)
    assert world.nodes["n1"].started == ["a-1-1"]
    assert not world.core.state.replicas
