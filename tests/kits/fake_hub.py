"""A server that speaks what huggingface_hub asks a hub for, with a storage host it redirects to."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

LFS_BYTES = 1000  # files of at least this size are kept "in LFS", as the hub does with weights


class FakeHub:
    """`models[name][revision]` are files; `token` guards those in `private`."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, dict[str, bytes]]] = {}
        self.heads: dict[str, str] = {}  # name -> the revision that main is now
        self.private: set[str] = set()
        self.token = "hf_right"
        self.url = ""
        self.calls: list[tuple[str, str]] = []  # (what, of which file or model)
        self.before_bytes: Any = None  # async (path) -> response or None
        self.storage_saw_token = False
        self.places = 0  # signed addresses given out; only the last one of a file works
        self._valid: dict[str, str] = {}
        app = web.Application()
        app.add_routes(
            [
                web.get("/api/models/{org}/{name}", self._info),
                web.get("/api/models/{org}/{name}/revision/{revision}", self._info),
                web.get("/{org}/{name}/resolve/{revision}/{path:.+}", self._resolve),
                web.get("/storage/{place}/{org}/{name}/{revision}/{path:.+}", self._storage),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)

    async def open(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{port}"
        # Another host than the hub's, as the real one's storage is: it must not see the token.
        await web.TCPSite(self._runner, "127.0.0.2", port).start()

    async def close(self) -> None:
        await self._runner.cleanup()

    def add(self, name: str, files: dict[str, bytes], head: bool = True) -> str:
        """A new commit of `name`; its hash."""
        listed = "".join(f"{p}{hashlib.sha1(d).hexdigest()}" for p, d in sorted(files.items()))
        revision = hashlib.sha1(f"{name}{listed}".encode()).hexdigest()
        self.models.setdefault(name, {})[revision] = files
        if head:
            self.heads[name] = revision
        return revision

    def count(self, what: str) -> int:
        return sum(call[0] == what for call in self.calls)

    def expire(self) -> None:
        """Signed addresses given out so far stop working."""
        self._valid.clear()

    def _refused(self, request, name):
        given = request.headers.get("Authorization", "")
        headers = {}
        if given and given != f"Bearer {self.token}":
            headers["X-Error-Message"] = "Invalid credentials in Authorization header"
        elif name in self.models and (name not in self.private or given):
            return None
        else:
            headers["X-Error-Code"] = "RepoNotFound"
        return web.json_response({"error": "Repository not found"}, status=401, headers=headers)

    def _revision(self, request, name):
        asked = request.match_info.get("revision", "main")
        return self.heads[name] if asked == "main" else asked

    async def _info(self, request):
        name = f"{request.match_info['org']}/{request.match_info['name']}"
        self.calls.append(("info", name))
        if refused := self._refused(request, name):
            return refused
        revision = self._revision(request, name)
        if revision not in self.models[name]:
            headers = {"X-Error-Code": "RevisionNotFound"}
            return web.json_response({"error": "no"}, status=404, headers=headers)
        assert request.query.get("blobs", "").lower() == "true"
        files = self.models[name][revision]
        siblings = [sibling(path, data) for path, data in files.items()]
        return web.json_response({"id": name, "sha": revision, "siblings": siblings})

    async def _resolve(self, request):
        info = request.match_info
        name, path = f"{info['org']}/{info['name']}", info["path"]
        self.calls.append(("resolve", path))
        if refused := self._refused(request, name):
            return refused
        data = self.models[name][info["revision"]][path]
        if len(data) < LFS_BYTES:
            return await self._bytes(request, path, data, info["revision"])
        self.places += 1
        self._valid[path] = str(self.places)
        headers = {
            "Location": f"{self.url.replace('0.0.1', '0.0.2')}/storage/{self.places}/{name}"
            f"/{info['revision']}/{path}",
            "X-Repo-Commit": info["revision"],
            "X-Linked-Size": str(len(data)),
            "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
        }
        return web.Response(status=302, headers=headers)

    async def _storage(self, request):
        info = request.match_info
        self.calls.append(("storage", info["path"]))
        self.storage_saw_token |= "Authorization" in request.headers
        if self._valid.get(info["path"]) != info["place"]:
            return web.Response(status=403, text="expired")
        files = self.models[f"{info['org']}/{info['name']}"][info["revision"]]
        return await self._bytes(request, info["path"], files[info["path"]], info["revision"])

    async def _bytes(self, request, path, data, revision):
        hook = self.before_bytes if request.method == "GET" else None
        if hook and (answer := await hook(path)):
            return answer
        headers = {"X-Repo-Commit": revision, "ETag": f'"{git_sha1(data)}"'}
        wanted = request.http_range
        if wanted.start is None:
            return web.Response(body=data, headers=headers)
        return web.Response(body=data[wanted], status=206, headers=headers)


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sibling(path: str, data: bytes) -> dict:
    found = {"rfilename": path, "size": len(data), "blobId": git_sha1(data)}
    if len(data) >= LFS_BYTES:
        sha256 = hashlib.sha256(data).hexdigest()
        found["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
    return found


@contextmanager
def hub_in_a_thread(models: dict[str, dict[str, bytes]]) -> Iterator[FakeHub]:
    """A FakeHub with these models that serves while a test blocks."""
    hub, loop = FakeHub(), asyncio.new_event_loop()
    for name, files in models.items():
        hub.add(name, files)
    loop.run_until_complete(hub.open())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        asyncio.run_coroutine_threadsafe(hub.close(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
