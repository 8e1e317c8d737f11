"""What the cache decides: eviction, whom to ask, which files, how fast."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cache.policy import (
    Complete,
    EvictableModel,
    FromOrigin,
    FromPeers,
    PeerOffer,
    Rate,
    TryLease,
    Wait,
    freed_bytes,
    is_wanted,
    next_step,
    pick_source,
    shortage_bytes,
    victims,
)
from runtime.checkpoints.model_files import ModelFile, Offer, check_path, model_id, parse_ref

BLOBS = st.dictionaries(st.sampled_from("abcdefgh"), st.just(0), min_size=1, max_size=4).map(
    lambda names: {name: 10 * (ord(name) - 96) for name in names}
)
MODELS = st.lists(st.tuples(BLOBS, st.floats(0, 100)), max_size=7).map(
    lambda rows: [
        EvictableModel(model_id=f"m{i}", blobs=blobs, used_at=at)
        for i, (blobs, at) in enumerate(rows)
    ]
)
IN_USE = st.sets(st.sampled_from([f"m{i}" for i in range(7)]))
KEPT = st.sets(st.sampled_from("abcdefgh"))


@given(MODELS, IN_USE, KEPT, st.integers(-10, 300))
def test_eviction_frees_enough_and_no_model_in_vain(models, in_use, kept, shortage) -> None:
    chosen = victims(models, in_use, kept, shortage)
    if chosen is None:
        everything = {m.model_id for m in models} - in_use
        assert freed_bytes(everything, models, kept) < shortage
        return
    assert not set(chosen) & in_use
    assert freed_bytes(chosen, models, kept) >= shortage or shortage <= 0
    for spared in chosen:
        assert freed_bytes(set(chosen) - {spared}, models, kept) < shortage


@given(MODELS, IN_USE, KEPT, st.integers(1, 300))
def test_what_is_freed_is_never_a_blob_that_is_needed(models, in_use, kept, shortage) -> None:
    chosen = victims(models, in_use, kept, shortage) or []
    left = {blob for m in models if m.model_id not in chosen for blob in m.blobs} | kept
    gone = {blob: n for m in models if m.model_id in chosen for blob, n in m.blobs.items()}
    freed = sum(n for blob, n in gone.items() if blob not in left)
    assert freed == freed_bytes(chosen, models, kept)


def held(name: str, used_at: float, **blobs: int) -> EvictableModel:
    return EvictableModel(model_id=name, blobs=blobs, used_at=used_at)


def test_the_least_recently_used_goes_first() -> None:
    models = [held("new", 3, a=10), held("old", 1, b=10), held("middle", 2, c=10)]
    assert victims(models, (), (), 10) == ["old"]
    assert victims(models, (), (), 15) == ["old", "middle"]
    assert victims(models, ("old",), (), 10) == ["middle"]
    assert victims(models, (), (), 31) is None


def test_a_small_old_model_is_spared_where_the_next_one_suffices() -> None:
    models = [held("small", 1, a=1), held("big", 2, b=100)]
    assert victims(models, (), (), 100) == ["big"]


def test_removing_one_of_two_models_that_share_a_file_does_not_count_it() -> None:
    models = [held("base", 1, shared=90, a=1), held("tuned", 2, shared=90, b=1)]
    assert freed_bytes({"base"}, models, ()) == 1
    assert victims(models, (), (), 2) == ["base", "tuned"]
    assert victims(models, ("tuned",), (), 2) is None


@pytest.mark.parametrize(
    ("need", "used", "limit", "free", "short"),
    [
        (10, 0, None, 100, 0),
        (10, 0, None, 4, 6),
        (10, 95, 100, 100, 5),
        (10, 95, 100, 1, 9),
        (0, 120, 100, 100, 20),
    ],
)
def test_shortage(need, used, limit, free, short) -> None:
    found = shortage_bytes(
        need_bytes=need, used_bytes=used, limit_bytes=limit, disk_free_bytes=free
    )
    assert found == short


# ------------------------------------------------------------------------------ who is asked


def file(letter: str) -> ModelFile:
    return ModelFile(path=f"{letter}.bin", sha256=letter * 64, size_bytes=1)


def offers(url: str, letters: str, complete: bool = False, revision: str = "r1") -> PeerOffer:
    files = tuple(file(letter) for letter in letters)
    offer = Offer(source="hf:o/m", revision=revision, complete=complete, size_bytes=9, files=files)
    return PeerOffer(url=url, offer=offer)


def test_peers_come_before_the_origin_even_for_the_lease_holder() -> None:
    step = next_step((), [offers("p", "ab")], "mine")
    assert step == FromPeers(((file("a"), ("p",)), (file("b"), ("p",))))


def test_every_peer_that_has_a_file_is_named() -> None:
    step = next_step({"a" * 64}, [offers("p", "ab", True), offers("q", "b")], "none")
    assert step == FromPeers(((file("b"), ("p", "q")),))


def test_all_here_means_complete_only_by_a_complete_offer() -> None:
    have = {"a" * 64}
    assert next_step(have, [offers("p", "a")], "other") == Wait()
    whole = offers("p", "a", True)
    assert next_step(have, [whole], "other") == Complete(whole.offer)


def test_a_complete_peer_decides_which_revision() -> None:
    step = next_step((), [offers("p", "a", revision="old"), offers("q", "b", True)], "none")
    assert step == FromPeers(((file("b"), ("q",)),))


def test_without_offers_it_is_the_lease_that_counts() -> None:
    assert next_step((), [], "none") == TryLease()
    assert next_step((), [], "other") == Wait()
    assert next_step((), [], "mine") == FromOrigin()
    assert next_step((), [], "unknown") == FromOrigin()


@given(st.integers(0, 50), st.sets(st.sampled_from("pqrs")))
def test_a_failed_source_is_never_picked(chunk, failed) -> None:
    picked = pick_source(chunk, tuple("pqrs"), failed)
    assert (picked is None) == (failed == set("pqrs"))
    assert picked not in failed


def test_ranges_are_spread_evenly() -> None:
    assert [pick_source(i, ("p", "q"), ()) for i in range(4)] == ["p", "q", "p", "q"]


# ------------------------------------------------------------------------------ files and rates


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("tokenizer.model", True),
        ("modeling_custom.py", True),
        ("consolidated.safetensors", True),
        ("pytorch_model-00001-of-00002.bin", False),
        ("pytorch_model.bin.index.json", False),
        ("original/consolidated.00.pth", False),
        ("model.gguf", False),
        (".gitattributes", False),
    ],
)
def test_other_formats_are_left_where_there_are_safetensors(path, wanted) -> None:
    assert is_wanted(path, has_safetensors=True) is wanted


def test_without_safetensors_all_weights_are_wanted() -> None:
    assert is_wanted("pytorch_model.bin", has_safetensors=False)
    assert not is_wanted(".gitattributes", has_safetensors=False)


def test_rate_and_eta() -> None:
    rate = Rate(window_s=10)
    assert rate.bytes_per_s() == 0
    assert rate.eta_s(100) is None
    rate.seen(0, 0)
    rate.seen(5, 500)
    assert rate.bytes_per_s() == 100
    assert rate.eta_s(200) == 2
    for at in (10, 15, 20):
        rate.seen(at, 500 + 10 * (at - 5))  # slower now: the fast start is out of the window
    assert rate.bytes_per_s() == 10


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "", "a\\b", "a\0b"])
def test_a_path_that_leaves_the_folder_is_refused(path) -> None:
    with pytest.raises(ValueError, match="leaves its folder"):
        check_path(path)


def test_refs() -> None:
    assert parse_ref("llama") is None
    assert parse_ref("/models/llama") is None
    ref = parse_ref("hf:org/name")
    assert (ref.source, ref.asked, ref.text) == ("hf:org/name", "main", "hf:org/name@main")
    assert parse_ref("hf:org/name@v1").asked == "v1"
    assert parse_ref("s3://bucket/a/b/").text == "s3://bucket/a/b"
    assert parse_ref("hf:org/name@refs/pr/1").asked == "refs/pr/1"


@pytest.mark.parametrize("bad", [
    "hf:", "hf:../x", "hf:a/b/c", "hf:a/b\n", "hf:" + "a" * 200,
    "hf:a/b@", "hf:a/b@v1/../../../etc", "hf:a/b@..", "hf:a/b@/etc", "hf:a/b@v1/", "hf:a/b@v1\n",
    "hf:a/b@v1?x", "hf:a/b@a//b", "hf:a/b@.hidden", "hf:a/b@" + "v" * 129,
    "s3://bucket", "s3:///x", "s3://b/../x", "s3://bucket/a/../../x", "s3://bucket/a//b",
    "s3://bucket/a\n", "s3://bu?cket/a", "s3://../a", "s3://bucket/./a",
    "../x", "a/../../etc", "/models/../etc", "a\0b", "a\nb", "x" * 256, "a\\b", "\udcff",
])  # fmt: skip
def test_a_source_that_could_name_another_place_is_none(bad: str) -> None:
    with pytest.raises(ValueError, match="write"):
        parse_ref(bad)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a//b", "", "a/./b", "a\nb"])
def test_a_file_that_leaves_its_folder_is_in_no_manifest_or_offer(path: str) -> None:
    with pytest.raises(ValueError, match="leaves its folder"):
        ModelFile(path=path, sha256="0" * 64, size_bytes=1)
    told = msgspec.json.encode(
        {"source": "hf:a/b", "revision": "r", "complete": True, "size_bytes": 1,
         "files": [{"path": path, "sha256": "0" * 64, "size_bytes": 1}]}
    )  # fmt: skip
    with pytest.raises(msgspec.ValidationError, match="leaves its folder"):
        msgspec.json.decode(told, type=Offer)


def test_model_ids_differ_by_source_and_revision_and_name_a_folder() -> None:
    ids = {model_id(s, r) for s in ("hf:o/a-b", "hf:o/a.b") for r in ("1", "2")}
    assert len(ids) == 4
    assert all(set(i) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for i in ids)
