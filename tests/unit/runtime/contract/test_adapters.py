"""LoRA adapters as a spec, a route, an estimate and an index have them."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

import pytest

from runtime.contract.adapters import takes_adapters, with_lora_args
from runtime.contract.schema import SchemaError
from runtime.contract.spec_file import name_clashes, parse_specs
from runtime.engine.adapter_index import Index, NotYet
from runtime.engine.contract import LaunchContext
from runtime.engine.select import get_engine
from runtime.engine.vllm import lora
from runtime.engine.vllm.memory_estimate import estimate
from runtime.router.admission.decisions import Admission, Forward
from runtime.router.admission.refusals import Refused
from runtime.sizes import GIB
from runtime.wire.model_spec import ModelSpec
from runtime.wire.routes import Endpoint, ModelRoute, RouteTable
from scheduler.policy.model_routes import adapters_on
from scheduler.state.messages import StoredModel
from tests.kits.lora_adapter import write_adapter
from tests.kits.scheduler_world import FakeNode, World, spec

CONFIG = {
    "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 2048, "torch_dtype": "bfloat16",
}  # fmt: skip


def model(**fields):
    known: dict[str, Any] = {"name": "m", "source": "/m", "device_memory_bytes": GIB}
    return ModelSpec(**(known | fields))


def stored(rank=0, **fields):
    return StoredModel(spec=model(**fields), lora_rank=rank)


# ------------------------------------------------------------------------------ the spec


def test_adapters_are_names_of_their_model():
    (one,) = parse_specs("name: m\nsource: /m\nadapters: {sql: hf:org/sql@v1, b: /folder}")
    assert one.adapters == {"sql": "hf:org/sql@v1", "b": "/folder"}
    assert parse_specs("name: m\nsource: /m\nadapters: {a_bytes: /x}")[0].adapters
    assert one.names() == ("m",)
    assert one.adapter_names() == ("m:sql", "m:b")


@pytest.mark.parametrize(
    ("more", "field", "words"),
    [
        ("adapters: {a: ftp:x}", "adapters.a", "unknown scheme 'ftp'"),
        ("adapters: {a: ''}", "adapters.a", "names no source"),
        ("adapters: {a: 7}", "adapters.a", "text"),
        ("adapters: {'a b': /x}", "adapters.a b", "(got 'a b'); 1 to 64 letters"),
        (
            "adapters: {a: /x}\nengine_args: {--enable-lora: false}",
            "engine_args.--enable-lora",
            "but there are adapters",
        ),
        ("adapters: {a: /x}\naliases: ['m:a']", "aliases", "repeats a name"),
    ],
)
def test_what_is_wrong_with_them_is_named(more, field, words):
    with pytest.raises(SchemaError) as raised:
        parse_specs(f"name: m\nsource: /m\n{more}")
    found = {problem.field: str(problem) for problem in raised.value.problems}
    assert words in found[field], found


def test_an_adapter_and_another_models_alias_clash():
    (problem,) = name_clashes([model(aliases=("b:sql",)), model(name="b", adapters={"sql": "/x"})])
    assert (problem.field, problem.value) == ("adapters", "b:sql")


# ------------------------------------------------------------------------------ the launch key


def test_only_room_for_adapters_restarts_an_engine():
    none = stored().effective()
    one, other = stored(8, adapters={"a": "/a"}), stored(16, adapters={"a": "/a", "b": "/b"})
    assert none == model()
    assert none.launch_key() != one.effective().launch_key()
    assert one.effective().launch_key() == other.effective().launch_key()
    assert other.effective().engine_args == {
        "enable_lora": True, "max_loras": 4, "max_lora_rank": 16,
    }  # fmt: skip
    wide = stored(17, adapters={"a": "/a"}).effective()
    assert wide.engine_args["max_lora_rank"] == 32
    assert wide.launch_key() != one.effective().launch_key()


def test_an_adapter_that_goes_leaves_the_room_for_its_rank_until_all_are_gone():
    wide = stored(40, adapters={"a": "/a", "b": "/b"})
    fewer = stored(8, adapters={"a": "/a"}).after(wide)
    assert fewer.effective().launch_key() == wide.effective().launch_key()
    gone = stored(0).after(fewer)
    assert gone.lora_rank == 0
    assert stored(8, adapters={"a": "/a"}).after(gone).lora_rank == 8
    assert stored(8, adapters={"a": "/a"}).after(None).lora_rank == 8


def test_what_a_spec_says_itself_wins():
    said = {"--max-lora-rank": 64, "max-loras": 1, "enable_lora": True}
    assert with_lora_args(model(adapters={"a": "/a"}, engine_args=said), 8).engine_args == said
    assert takes_adapters({"--enable-lora": True})
    assert not takes_adapters({"enable_lora": False, "max_loras": 2})


# ------------------------------------------------------------------------------ who is told


def test_a_running_replica_keeps_up_with_its_models_adapters():
    world = World(FakeNode("n", {"d": 24 * GIB}))
    state = world.core.state
    world.put(spec("m", adapters={"sql": "/x"}), spec("other"))
    world.want("m")
    world.want("other")
    world.run(10)
    assert world.route("m").adapters == ("m:sql",)
    assert adapters_on(state, "n") == {"m": {"sql": "/x"}}
    assert adapters_on(state, "elsewhere") == {}
    before = set(state.replicas)

    world.put(spec("m", adapters={"sql": "/x", "new": "/y"}))
    world.run(10)
    assert world.route("m").adapters == ("m:sql", "m:new")
    assert adapters_on(state, "n") == {"m": {"sql": "/x", "new": "/y"}}
    assert set(state.replicas) == before

    world.put(spec("m"))
    assert world.route("m").adapters == ()
    assert adapters_on(state, "n") == {"m": {}}, "it was started with some"
    world.run(20)
    assert not before & set(state.replicas) & set(state.models["m"].replicas)


def test_requests_for_an_adapter_follow_its_model():
    admission = Admission()
    endpoint = Endpoint(replica_id="r", base_url="http://e", key="k")
    hot = ModelRoute(name="m", adapters=("m:sql",), endpoints=(endpoint,))
    admission.routes(RouteTable(version=1, models=(hot,)), 0.0)
    assert isinstance(admission.arrive("1", "m:sql", 0.0), Forward)
    refused = admission.arrive("2", "m:sqk", 0.0)
    assert isinstance(refused, Refused)
    assert refused.status == 404
    assert "m:sqk" in refused.message
    demand = admission.demand(0.0)
    assert [part.model for part in demand] == ["m"]


# ------------------------------------------------------------------------------ memory


def write_base(folder, config=CONFIG):
    """A Llama of two layers: a true header, and a hole for the data."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (320, 256)}
    for layer in range(2):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.self_attn.q_proj.weight": (256, 256),
            f"{name}.self_attn.v_proj.weight": (128, 256),
            f"{name}.mlp.up_proj.weight": (512, 256),
            f"{name}.input_layernorm.weight": (256,),
        }
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return folder


def test_the_estimate_counts_the_slots_in_words(tmp_path):
    base = str(write_base(tmp_path / "m"))
    plain = estimate(model(), base)
    spec = with_lora_args(model(adapters={"a": "/a"}, engine_args={"max_loras": 3}), 20)
    found = estimate(spec, base)
    values = 2 * 32 * ((256 + 256) + (128 + 256) + (512 + 256))  # layers x rank x (out + in)
    assert found.adapters_bytes == 3 * values * 2
    assert found.total_bytes == plain.total_bytes + found.adapters_bytes
    assert "LoRA adapters 0.00 GiB (3 slots of rank 32)" in found.explanation
    assert (plain.adapters_bytes, "LoRA" in plain.explanation) == (0, False)


def test_two_devices_copy_the_half_that_reads(tmp_path):
    base = str(write_base(tmp_path / "m"))
    args = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 16}
    found = estimate(model(tensor_parallel_size=2, engine_args=args), base)
    assert found.adapters_bytes == 2 * 16 * ((256 + 512) + (128 + 512) + (512 + 512)) * 2


# ------------------------------------------------------------------------------ their files


def checked(tmp_path, spec_fields=None, base=True, **made):
    folder = write_adapter(tmp_path / "a", **made)
    spec = model(adapters={"a": "/a"}, **(spec_fields or {}))
    return lora.check(spec, write_base(tmp_path / "m") if base else None, {"a": folder})


def test_an_adapter_of_this_base_is_fine_whatever_its_base_was_called(tmp_path):
    assert checked(tmp_path, rank=8) == ([], 8)


def test_the_highest_rank_of_its_modules_counts(tmp_path):
    assert checked(tmp_path, rank=8, rank_pattern={"q_proj": 24}) == ([], 24)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"hidden": 128}, "q_proj has 256 inputs here, 128 there"),
        ({"kv": 256}, "v_proj has 128 outputs here, 256 there"),
        ({"layers": 3}, "this one has no model.layers.2.self_attn.q_proj"),
    ],
)
def test_an_adapter_of_another_base_is_told_by_its_shapes(tmp_path, made, words):
    (problem,), _ = checked(tmp_path, **made)
    assert problem.field == "adapters.a"
    assert "is for another base" in problem.message
    assert words in problem.message


def test_what_cannot_be_compared_is_left_to_the_engine(tmp_path):
    assert checked(tmp_path, base=False, hidden=128) == ([], 8)
    packed = write_base(tmp_path / "m", CONFIG | {"quantization_config": {"bits": 4}})
    assert lora.misfit(write_adapter(tmp_path / "b", hidden=128), packed) is None


def test_a_folder_that_is_no_adapter_is_refused_with_the_reason(tmp_path):
    spec = model(adapters={"a": "/a"})
    (problem,), rank = lora.check(spec, None, {"a": tmp_path})
    assert rank == 0
    assert "has no adapter_config.json: it is not a LoRA adapter" in problem.message
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 0}')
    (problem,), _ = lora.check(spec, None, {"a": tmp_path})
    assert "its rank `r` is 0" in problem.message


def test_a_rank_above_what_was_declared_says_what_to_declare(tmp_path):
    fields = {"engine_args": {"--max-lora-rank": 16}}
    (problem,), _ = checked(tmp_path, fields, rank=24)
    assert problem.message == "has rank 24, more than engine_args.max_lora_rank, 16"
    assert problem.fix == "raise engine_args.max_lora_rank to 32"


# ------------------------------------------------------------------------------ the index


def write_index(file, **entries):
    blank = {"source": "s", "path": None, "error": None}
    adapters = {f"m:{name}": blank | entry for name, entry in entries.items()}
    file.write_text(json.dumps({"model": "m", "adapters": adapters}))


async def test_an_engine_waits_for_an_adapter_that_is_being_fetched(tmp_path):
    index = Index(str(tmp_path / "m.json"))
    write_index(tmp_path / "m.json", sql={})
    asked = asyncio.create_task(index.find("m:sql"))
    done, _ = await asyncio.wait([asked], timeout=0.3)
    assert not done
    here = str(write_adapter(tmp_path / "here", rank=8, rank_pattern={"q_proj": 24}))
    write_index(tmp_path / "m.json", sql={"path": here})
    assert await asked == here
    assert await Index(str(tmp_path / "m.json"), max_rank=24).find("m:sql") == here
    with pytest.raises(NotYet, match="has rank 24: this engine has room for 16"):
        await Index(str(tmp_path / "m.json"), max_rank=16).find("m:sql")


async def test_and_is_told_when_it_takes_too_long_or_failed(tmp_path):
    index = Index(str(tmp_path / "m.json"))
    with pytest.raises(NotYet, match="can't be read"):
        await index.find("m:sql", 0.0)
    write_index(tmp_path / "m.json", sql={}, bad={"error": "no such bucket"})
    with pytest.raises(NotYet, match="m:sql is still being fetched"):
        await index.find("m:sql", 0.0)
    with pytest.raises(NotYet, match="m:bad can't be had: no such bucket"):
        await index.find("m:bad")
    with pytest.raises(NotYet, match="m:new is not known to this node yet"):
        await index.find("m:new", 0.0)
    assert await index.find("other:sql") is None


# ------------------------------------------------------------------------------ vLLM's start


def test_vllm_gets_the_index_and_our_resolver_only_with_adapters(tmp_path):
    base = write_base(tmp_path / "m")
    ctx = LaunchContext(
        replica_id="r", host="127.0.0.1", port=1, route_key="r", control_key="c",
        device_kind="cpu", device_ids=("cpu:n",), device_indexes=(0,), device_bytes=4 * GIB,
        device_total_bytes=8 * GIB, model_path=str(base), revision=None, python="python",
        cache_dir=str(tmp_path / "cache"), adapter_index="/state/adapters/m.json",
    )  # fmt: skip
    spec = with_lora_args(model(adapters={"a": "/a"}), 8)
    launch = get_engine("vllm").launch(spec, ctx)
    assert launch.env["STOKER_ADAPTERS"] == "/state/adapters/m.json"
    assert launch.env["STOKER_MAX_LORA_RANK"] == "16"
    assert launch.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "runtime.engine.vllm.adapters.Guard" in launch.argv
    assert {"--enable-lora", "--max-lora-rank=16", "--max-loras=4"} <= set(launch.argv)
    assert not any("m:a" in word for word in launch.argv), "so that another one restarts nothing"
