"""Which replica a prompt's keys lead to: each rule by example, the bounds for whatever is drawn."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.router.admission import affinity
from runtime.router.admission.affinity import SLACK, Affinity

FOUR = ("a", "b", "c", "d")
KEYS = st.integers(-(2**32), 2**32 - 1)
CHAINS = st.lists(KEYS, min_size=1, max_size=8, unique=True).map(tuple)
LOADS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 100_000), min_size=1)


def idle(*replicas: str) -> dict[str, int]:
    return dict.fromkeys(replicas, 0)


def homed(home: str, replicas: tuple[str, ...] = FOUR) -> int:
    """A key of a beginning that has its home there."""
    return next(key for key in range(1000) if Affinity().home(key, replicas) == home)


@given(
    loads=LOADS,
    tokens=st.integers(1, 100_000),
    keys=CHAINS,
    past=st.lists(st.tuples(CHAINS, st.sampled_from("abcdefgh")), max_size=20),
)
def test_who_is_picked_may_be_chosen_and_keeps_within_the_bound(
    loads: dict[str, int], tokens: int, keys: tuple[int, ...], past: list
) -> None:
    made = Affinity()
    for earlier, replica in [*past, *((keys[:2], replica) for _, replica in past[:2])]:
        made.sent(earlier, replica)
    picked = made.pick(keys, loads, tokens)
    if picked is not None:
        mean = (sum(loads.values()) + tokens) / len(loads)
        assert loads[picked] <= (1 + SLACK) * mean


def test_the_example_of_the_first_page() -> None:
    loads = {"a": 900, "b": 300, "c": 0, "d": 0}  # with 800 more the mean is 500
    made = Affinity()
    made.sent((1,), "a")
    made.sent((2,), "b")
    assert made.pick((1,), loads, 800) is None
    assert made.pick((2,), loads, 800) == "b"
    assert made.pick((1,), loads | {"a": 625}, 1075) == "a"  # the bound itself is within it
    at_a, at_b = homed("a"), homed("b")
    assert Affinity().pick((at_a,), loads, 800) is None
    assert Affinity().pick((at_b,), loads, 800) == "b"
    assert Affinity().pick((at_b,), {"a": 0, "b": 501, "c": 0, "d": 699}, 800) is None


@given(
    key=KEYS,
    replicas=st.sets(st.text("abcdef0123456789-", min_size=1), min_size=1, max_size=64),
    other=st.text("xyz", min_size=1),
)
def test_a_replica_that_joins_or_leaves_moves_only_its_own_keys(
    key: int, replicas: set[str], other: str
) -> None:
    made = Affinity()
    before = made.home(key, replicas)
    assert made.home(key, replicas | {other}) in {before, other}
    for gone in replicas - {before}:
        assert made.home(key, replicas - {gone}) == before


@pytest.mark.parametrize("count", [2, 3, 8, 64])
def test_every_replica_is_home_to_its_share(count: int) -> None:
    made, replicas = Affinity(), [f"replica-{index}" for index in range(count)]
    per_replica = 1000
    keys = range(0, 2**32, 2**32 // (per_replica * count))
    homes = Counter(made.home(key, replicas) for key in keys)
    assert homes.keys() == set(replicas)
    assert max(homes.values()) < 1.2 * per_replica
    assert min(homes.values()) > 0.8 * per_replica


def test_routers_that_never_spoke_agree_on_a_new_prompt() -> None:
    one, other = Affinity(), Affinity()
    one.sent((900,), "d")  # of another prompt
    for key in range(50):
        loads = idle(*FOUR)
        assert one.pick((key, key + 100), loads, 10) == other.pick((key, key + 100), loads, 10)


def test_a_longer_prompt_goes_where_its_beginning_went() -> None:
    made = Affinity()
    turn, later = (1, 2, 3), (1, 2, 3, 4)
    for replica in FOUR:
        made.sent(turn, replica)
        assert made.pick(later, idle(*FOUR), 10) == replica
        made = Affinity()


def test_less_than_a_quarter_in_common_is_nothing_in_common() -> None:
    made = Affinity()
    other = next(key for key in range(1000) if made.home(key, FOUR) != "a")
    made.sent((7,), "a")
    assert made.pick((7, other), idle(*FOUR), 10) == "a"  # half to a quarter of it
    assert made.pick((7, other, 5), idle(*FOUR), 10) == made.home(other, FOUR) != "a"


def test_of_those_who_have_read_it_the_least_loaded_goes_on() -> None:
    made = Affinity()
    made.sent((1, 2), "a")
    made.sent((1, 2), "b")
    assert made.pick((1, 2), {"a": 50, "b": 10, "c": 90, "d": 90}, 10) == "b"


def test_a_beginning_that_everybody_has_read_binds_nobody() -> None:
    made = Affinity()
    for replica in ("a", "b", "c"):
        made.sent((1, 2), replica)
    assert made.pick((1, 2), idle(*FOUR), 10) is None
    own = next(key for key in range(10, 1000) if made.home(key, FOUR) == "d")
    assert made.pick((1, 2, own), idle(*FOUR), 10) == "d"  # what is its own decides


def test_a_session_is_where_it_was_last() -> None:
    made = Affinity()
    for replica in FOUR:
        made.sent((-5,), replica)
        assert made.pick((-5,), idle(*FOUR), 10) == replica


def test_a_replica_that_is_gone_is_not_picked() -> None:
    made = Affinity()
    made.sent((-5,), "a")
    made.sent((1, 2), "a")
    for keys in ((-5,), (1, 2)):
        assert made.pick(keys, idle("b", "c"), 10) == made.home(keys[-1], ("b", "c"))


def test_the_keys_sent_longest_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "MEMORY", 4)
    made = Affinity()
    away = [key for key in range(1000) if made.home(key, FOUR) != "a"][:5]
    for key in away[:4]:
        made.sent((key,), "a")
    made.sent((away[0],), "a")  # so the second is now the oldest
    made.sent((away[4],), "a")
    picked = [made.pick((key,), idle(*FOUR), 10) for key in away]
    assert [replica == "a" for replica in picked] == [True, False, True, True, True]


def test_hashes_of_replicas_no_longer_listed_are_dropped() -> None:
    made = Affinity()
    homes = [made.home(key, FOUR) for key in range(20)]
    made.keep_only({"a"})
    assert set(made._salt) == {"a"}
    assert [made.home(key, FOUR) for key in range(20)] == homes
