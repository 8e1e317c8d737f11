"""Which engine, and what it is told to load."""

import pytest

from runtime.engine import get_engine, resolve_source
from runtime.wire import ModelSpec


def spec(source, engine="vllm"):
    return ModelSpec(name="m", source=source, engine=engine)


@pytest.mark.parametrize("name", ["vllm", "stub"])
def test_engines_are_found_by_name(name):
    assert get_engine(name).name == name


def test_an_unknown_engine_is_told():
    with pytest.raises(ValueError, match="no engine 'tgi'; choose vllm or stub"):
        get_engine("tgi")


@pytest.mark.parametrize(
    ("source", "resolved"),
    [("hf:org/name", ("org/name", None)), ("hf:org/name@v1", ("org/name", "v1")),
     ("s3://bucket/path", ("s3://bucket/path", None))],
)  # fmt: skip
def test_remote_sources_are_left_to_the_engine(source, resolved, tmp_path):
    assert resolve_source(spec(source), str(tmp_path)) == resolved


def test_local_folders_are_found_alone_or_below_the_model_dir(tmp_path, monkeypatch):
    folder = tmp_path / "models" / "a"
    folder.mkdir(parents=True)
    assert resolve_source(spec(str(folder)), "/nowhere") == (str(folder), None)
    assert resolve_source(spec("a"), str(tmp_path / "models")) == (str(folder), None)
    monkeypatch.chdir(tmp_path)
    assert resolve_source(spec("models/a"), "/nowhere") == (str(folder), None)


def test_a_folder_that_is_not_there_is_told_with_where_it_was_sought(tmp_path):
    with pytest.raises(ValueError, match="is not a folder on this node") as caught:
        resolve_source(spec("gone"), str(tmp_path))
    assert str(tmp_path / "gone") in str(caught.value)


def test_the_stub_needs_no_files(tmp_path):
    assert resolve_source(spec("gone", "stub"), str(tmp_path)) == ("gone", None)
