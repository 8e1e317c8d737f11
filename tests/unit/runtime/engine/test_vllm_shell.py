"""How two configs are compared before an engine is changed; no vLLM is needed."""

from __future__ import annotations

import dataclasses
from typing import Any

from runtime.engine.vllm.shell import differences
from runtime.engine.vllm.shell_core import adopt


class Hf:
    """As a config of transformers: it knows what it holds."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def to_dict(self) -> dict[str, Any]:
        return self.fields


@dataclasses.dataclass
class Model:
    model: str = "/a"
    tokenizer: str = "/a"
    served_model_name: Any = "a"
    dtype: str = "bfloat16"
    hf_config: Any = None
    sizes: Any = (1, 2)


@dataclasses.dataclass
class Config:
    model_config: Model
    instance_id: str = "x"
    cache: Any = None


def found(old: Model, new: Model, **more: Any) -> list[str]:
    return sorted(differences(Config(old), Config(new, **more)))


def test_names_folders_and_token_ids_may_differ() -> None:
    old = Model(hf_config=Hf(_name_or_path="/a", eos_token_id=1, vocab_size=8))
    new = Model("/b", "/b", ["b", "c"], hf_config=Hf(_name_or_path="/b", vocab_size=8))
    assert found(old, new, instance_id="y") == []


def test_all_else_is_told_by_its_path() -> None:
    old = Model(hf_config=Hf(vocab_size=8, rope={"factor": 1.0, "kinds": ["a"]}))
    new = Model(
        dtype="float16", sizes=(1, 3), hf_config=Hf(vocab_size=9, rope={"factor": 2.0, "kinds": []})
    )
    assert found(old, new, cache={"fp8": True}) == [
        "cache",
        "model_config.dtype",
        "model_config.hf_config.rope.factor",
        "model_config.hf_config.rope.kinds",
        "model_config.hf_config.vocab_size",
        "model_config.sizes[1]",
    ]
    assert found(Model(sizes=(1,)), Model(sizes=[1])) == ["model_config.sizes"]
    assert found(Model(hf_config=Hf(a=1)), Model(hf_config=Hf())) == ["model_config.hf_config.a"]


def test_who_holds_a_config_sees_the_other_model() -> None:
    held, fresh = Model(), Model("/b", hf_config=Hf())
    vars(held)["cached"] = "of the first model"
    adopt(held, fresh)
    assert vars(held) == vars(fresh)
