"""Model specs: what is accepted, and what a refusal says."""

from __future__ import annotations

import pytest
from jsonschema import Draft202012Validator

from runtime.contract.schema import SchemaError, close_names, parse_bytes
from runtime.contract.spec_file import json_schema, load_specs, parse_spec, parse_specs
from runtime.wire.model_spec import ModelSpec


def problems(text: str, suffix: str = ".yaml") -> dict[str, str]:
    with pytest.raises(SchemaError) as caught:
        parse_specs(text, suffix)
    return {p.field: str(p) for p in caught.value.problems}


def test_a_full_spec_reads_from_yaml_toml_and_json(tmp_path) -> None:
    yaml = tmp_path / "m.yaml"
    yaml.write_text(
        "name: qwen\nsource: hf:Qwen/Qwen3-8B@main\naliases: [gpt-4o, Qwen/Qwen3-8B]\n"
        "device_memory_bytes: 20GiB\nengine_args: {max_model_len: 4096}\nidle_s: 60\n"
    )
    toml = tmp_path / "m.toml"
    toml.write_text(
        'name = "qwen"\nsource = "hf:Qwen/Qwen3-8B@main"\naliases = ["gpt-4o", "Qwen/Qwen3-8B"]\n'
        'device_memory_bytes = "20GiB"\nidle_s = 60\n[engine_args]\nmax_model_len = 4096\n'
    )
    (from_yaml,), (from_toml,) = load_specs(yaml), load_specs(toml)
    assert from_yaml == from_toml
    assert from_yaml.device_memory_bytes == 20 * 2**30
    assert from_yaml.names() == ("qwen", "gpt-4o", "Qwen/Qwen3-8B")
    assert parse_specs('{"name": "a", "source": "/m"}')[0].engine == "vllm"


def test_a_file_may_hold_several_models() -> None:
    listed = parse_specs("- {name: a, source: /m}\n- {name: b, source: /m}")
    keyed = parse_specs("models:\n  - {name: a, source: /m}\n  - {name: b, source: /m}")
    assert [s.name for s in listed] == [s.name for s in keyed] == ["a", "b"]


def test_every_problem_is_named_with_value_and_fix() -> None:
    found = problems(
        "name: a b\nsorce: /m\nidle_s: -2\nengine: vlm\ndevice_memory_bytes: 12Gx\npriority: true\n"
    )
    assert found["sorce"] == ("sorce: is not a known field (got '/m'); did you mean 'source'?")
    assert found["source"].startswith("source: is required; add it: where the weights are")
    assert "(got -2)" in found["idle_s"]
    assert "did you mean 'vllm'?" in found["engine"]
    assert "'12Gx' is not a size; write bytes or e.g. 12GiB" in found["device_memory_bytes"]
    assert "got a yes/no value" in found["priority"]
    assert "1 to 96 letters" in found["name"]


@pytest.mark.parametrize(
    ("text", "field", "says"),
    [
        ("name: a\nsource: /m\nmin_replicas: 3", "max_replicas", "is below min_replicas (3)"),
        ("name: a\nsource: ftp:x", "source", "has the unknown scheme 'ftp'"),
        ("name: a\nsource: 'hf:'", "source", "names no repository"),
        ("name: a\nsource: /m\naliases: [a]", "aliases", "repeats a name"),
        ("name: a\nsource: /m\nengine_args: {port: 1}", "engine_args.port", "is set by Stoker"),
        (
            "name: a\nsource: /m\nengine_args: {--gpu-memory-utilization: 0.5}",
            "engine_args.--gpu-memory-utilization",
            "set `device_memory_bytes`",
        ),
        ("- name: a", "source", "is required"),
        ("name: [", "document", "cannot be read"),
        ("just text", "model 1", "must be a mapping"),
        ("[]", "document", "holds no model"),
        ("models: []", "document", "holds no model"),
        ("name: a\nsource: /m\nname: b", "document", "the key 'name' twice"),
        ("name: a\nsource: hf:a/b/c", "source", "is not a hub model"),
        ("name: a\nsource: hf:org/name@", "source", "names no revision"),
        ("name: a\nsource: s3://bucket", "source", "names no model"),
        ("name: a\nsource: s3:bucket/m", "source", "write s3://bucket/path"),
        ("name: a\nsource: s3://bucket/", "source", "names no model"),
        ("name: a\nsource: ~/m", "source", "starts with '~'"),
        ("name: a\nsource: /m\nidle_s: .inf", "idle_s", "is not a finite number"),
        ("name: a\nsource: /m\nengine_args: {x: [.nan]}", "engine_args.x[0]", "not a finite"),
        ("name: a\nsource: /m\nengine_args: {x: 2026-01-01}", "engine_args.x", "quotes"),
        ("name: a\nsource: /m\nengine_args: {1: 2}", "engine_args", "keys must be text (got 1)"),
        ("name: a\nsource: /m\npriority: 9999999999999999999999", "priority", "<= 100"),
        (f"name: a\nsource: /m\ndevice_memory_bytes: {2**70}", "device_memory_bytes", "too large"),
        ("name: a\nsource: /m\ndevice_memory_bytes: 16", "device_memory_bytes", "e.g. 16GiB"),
    ],
)
def test_refusals(text: str, field: str, says: str) -> None:
    assert says in problems(text)[field]


@pytest.mark.parametrize(
    ("text", "field", "says"),
    [
        ("placement: {devics: [x]}", "placement.devics", "(got ['x']); did you mean 'devices'?"),
        ("placement: {spread: nodes}", "placement.spread", "choose one of: prefer, node, off"),
        (
            "placement: {labels: {zone: 1}}",
            "placement.labels.zone",
            "expected text, got a whole number (got 1)",
        ),
        ("placement: 3", "placement", "must be a mapping of fields (got 3); where its replicas"),
        (
            "autoscale: {metrics: [{metric: cpu, target: 1}]}",
            "autoscale.metrics[0].metric",
            "choose one of: queue_depth",
        ),
        ("autoscale: {metrics: [{metric: ttft_p95}]}", "autoscale.metrics[0].target", "required"),
        ("autoscale: {metrics: [3]}", "autoscale.metrics[0]", "must be a mapping of fields"),
        ("autoscale: {metrics: {a: 1}}", "autoscale.metrics", "expected a list, got a mapping"),
        ("autoscale: {panic_threshold: 0.5}", "autoscale.panic_threshold", "> 1.0 (got 0.5)"),
        ("autoscale: {up: {policies: [{type: pct}]}}", "autoscale.up.policies[0].type", "percent"),
        ("prewarm: {min_warm: hott}", "prewarm.min_warm", "did you mean 'hot'?"),
        ("prewarm: {schedule: [{cron: '0 8 * * *', for_s: 0}]}", "prewarm.schedule[0].for_s", "0"),
        ("aliases: [ok, a b]", "aliases[1]", "(got 'a b'); 1 to 192 letters"),
    ],
)
def test_a_problem_deep_inside_is_named_with_its_own_value(text, field, says) -> None:
    assert says in problems(f"name: a\nsource: /m\n{text}")[field]


def test_two_models_may_not_answer_to_one_name() -> None:
    found = problems("- {name: a, source: /m}\n- {name: b, source: /m, aliases: [a]}")
    assert "is already a name of model 'a'" in found["aliases"]


def test_a_bad_toml_names_the_line() -> None:
    assert "line 1" in problems("name = 1 2", ".toml")["document"]


def test_sizes() -> None:
    assert parse_bytes("12GiB") == 12884901888
    assert parse_bytes("1.5 GB") == 1500000000
    assert parse_bytes("4096") == 4096
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes("-1GiB")


def test_close_names_ignore_case_and_come_best_first() -> None:
    assert close_names("QWEN3-8", ["llama", "qwen3-8b", "qwen2-7b"])[0] == "qwen3-8b"
    assert close_names("zzz", ["llama"]) == []


def test_the_json_schema_accepts_what_the_parser_accepts() -> None:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    good = {"name": "a", "source": "/m", "device_memory_bytes": "12GiB", "aliases": ["x/y"]}
    parse_spec(good)
    assert not list(validator.iter_errors(good))
    for bad in ({**good, "idle_s": 0}, {**good, "nope": 1}, {"name": "a"}):
        with pytest.raises(SchemaError):
            parse_spec(bad)
        assert list(validator.iter_errors(bad))


def test_only_what_the_process_sees_changes_the_launch_key() -> None:
    base = ModelSpec(name="a", source="/m", engine_args={"x": 1, "y": 2})
    same = ModelSpec(name="a", source="/m", engine_args={"y": 2, "x": 1}, idle_s=9, affinity="off")
    other = ModelSpec(name="a", source="/m", engine_args={"x": 1, "y": 3})
    assert base.launch_key() == same.launch_key() != other.launch_key()


def test_a_replica_books_its_share_on_each_device_rounded_up() -> None:
    spec = ModelSpec(name="a", source="/m", device_memory_bytes=11, tensor_parallel_size=2)
    assert spec.booked_bytes() == 6
    with pytest.raises(ValueError, match="neither declared nor estimated"):
        ModelSpec(name="a", source="/m").booked_bytes()


@pytest.mark.parametrize(
    ("rules", "field"),
    [
        ({"metrics": [{"metric": "kv_cache_usage", "target": 70}]}, "autoscale.metrics[0].target"),
        (
            {"metrics": [{"metric": "concurrency", "target": 4}] * 2},
            "autoscale.metrics[1].metric",
        ),
        (
            {"down": {"policies": [{"type": "percent", "value": 150, "period_s": 60}]}},
            "autoscale.down.policies[0].value",
        ),
        ({"metrics": [{"metric": "speed", "target": 1}]}, "autoscale.metrics[0].metric"),
    ],
)
def test_a_bad_autoscale_rule_is_named(rules: dict, field: str) -> None:
    with pytest.raises(SchemaError) as error:
        parse_spec({"name": "a", "source": "/m", "autoscale": rules})
    assert [p.field for p in error.value.problems] == [field]


@pytest.mark.parametrize(
    "args",
    [
        {"allowed_media_domains": ["a.com", "--middleware", "evil.mod.Class"]},
        {"allowed_media_domains": ["a.com", "--config=x.yaml"]},
        {"lora_modules": ["-O3"]},
        {"lora_modules": ["-"]},
        {"api_key=secret": True},
        {"max_model_len=4096 --api-key": "x"},
        {"middleware.0": "evil.mod.Class"},
        {"no_middleware": True},
        {"no-api-key": "x"},
        {"-O": "3"},
        {"": 1},
        {"--": 1},
        {"a\nb": 1},
    ],
)
def test_an_argument_is_never_read_as_another_flag(args: dict[str, object]) -> None:
    with pytest.raises(SchemaError) as raised:
        parse_spec({"name": "a", "source": "/m", "engine_args": args})
    (problem,) = raised.value.problems
    assert problem.field == f"engine_args.{next(iter(args))}"
    assert problem.fix


def test_arguments_that_are_what_they_say_are_taken() -> None:
    args = {
        "--max-model-len": 4096, "cudagraph_capture_sizes": [-1, "-1", "-0.5", "4"],
        "compilation_config": {"x": ["--not-a-flag"]}, "compilation_config.level": 3,
        "chat_template": "--- a text ---", "cors": ["a.com", "b-c.org"],
    }  # fmt: skip
    assert parse_spec({"name": "a", "source": "/m", "engine_args": args}).engine_args == args


def test_a_name_is_one_whole_line() -> None:
    for name in ("a\n", "a\nb", "\na"):
        with pytest.raises(SchemaError, match="name"):
            parse_spec({"name": name, "source": "/m"})
