"""The cache filled from an S3-compatible server, over real HTTP with real signatures."""

from __future__ import annotations

import os

import pytest

from agent.cache.errors import CacheError
from agent.cache.s3 import S3Source
from tests.kits.cache_nodes import Nodes, read_model

boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
server = pytest.importorskip("moto.server", reason="moto[server] is not installed")

MB = 10**6
MODEL = "s3://models/team/llama"
FILES = {"config.json": b"{}", "model.safetensors": os.urandom(9 * MB), "sub/a": b"", "b": b"b"}


@pytest.fixture
def store(monkeypatch):
    running = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client = boto3.session.Session().client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="models")
    for path, data in FILES.items():
        client.put_object(Bucket="models", Key=f"team/llama/{path}", Body=data)
    client.put_object(Bucket="models", Key="team/llama-2/other", Body=b"not this one's")
    yield client
    running.stop()


@pytest.fixture
async def nodes(tmp_path):
    async with Nodes(tmp_path) as nodes:
        yield nodes


async def test_a_model_is_pulled_once_and_then_taken_from_the_peer(store, nodes) -> None:
    one, two = await nodes.start("one"), await nodes.start("two")
    assert read_model(await one.cache.ensure(MODEL)) == FILES
    store.delete_object(Bucket="models", Key="team/llama/config.json")
    assert read_model(await two.cache.ensure(MODEL)) == FILES
    assert one.url in two.cache.view().pulls[0].origin


async def test_an_object_of_several_parts(store, nodes) -> None:
    data = os.urandom(11 * MB)
    upload = store.create_multipart_upload(Bucket="models", Key="parts/w")["UploadId"]
    parts = []
    for number, start in enumerate(range(0, len(data), 6 * MB), 1):
        done = store.upload_part(
            Bucket="models", Key="parts/w", UploadId=upload, PartNumber=number,
            Body=data[start : start + 6 * MB],
        )  # fmt: skip
        parts.append({"ETag": done["ETag"], "PartNumber": number})
    store.complete_multipart_upload(
        Bucket="models", Key="parts/w", UploadId=upload, MultipartUpload={"Parts": parts}
    )
    node = await nodes.start()
    assert read_model(await node.cache.ensure("s3://models/parts")) == {"w": data}


async def test_an_object_that_changes_meanwhile_is_noticed(store, nodes, monkeypatch) -> None:
    listing = S3Source.listing

    def then_change(self):
        found = listing(self)
        store.put_object(Bucket="models", Key="team/llama/config.json", Body=b"[]")
        return found

    monkeypatch.setattr(S3Source, "listing", then_change)
    node = await nodes.start()
    with pytest.raises(CacheError, match=r"llama was changed while it was pulled; pull it again"):
        await node.cache.ensure(MODEL)
    assert node.cache.view().models == ()


async def test_wrong_bytes_are_refused(store, nodes, monkeypatch) -> None:
    read = S3Source.read_into

    def spoil(self, file, start, view):
        read(self, file, start, view)
        view[:1] = b"?"

    monkeypatch.setattr(S3Source, "read_into", spoil)
    node = await nodes.start()
    with pytest.raises(CacheError, match=r"from s3://models/team/llama is corrupt: its md5"):
        await node.cache.ensure(MODEL)
    assert node.cache.view().models == ()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("s3://nowhere/m", r"s3://nowhere/m: .*NoSuchBucket.*check bucket and path"),
        ("s3://models/none", r"s3://models/none has no files; check bucket and path"),
    ],
)
async def test_a_model_that_is_not_there(store, nodes, source, words) -> None:
    node = await nodes.start()
    with pytest.raises(CacheError, match=words) as raised:
        await node.cache.ensure(source)
    assert raised.value.kind == "not_found"


async def test_without_credentials(store, nodes, monkeypatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    node = await nodes.start()
    with pytest.raises(CacheError, match=r"refuses access \(no credentials\); set AWS_ACCESS") as e:
        await node.cache.ensure(MODEL)
    assert e.value.kind == "unauthorized"


async def test_a_store_that_does_not_answer(store, nodes, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    node = await nodes.start()
    with pytest.raises(CacheError, match=r"can't be read .*check the network.*AWS_ENDPOINT_URL"):
        await node.cache.ensure(MODEL)
