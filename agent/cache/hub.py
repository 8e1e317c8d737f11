"""The Hugging Face hub as an origin of models. The only file that knows huggingface_hub.

Rules this file keeps:
- a revision is resolved to a commit once, and every file is asked for at that commit;
- the token is $HF_TOKEN (or what `hf auth login` left); it goes to the hub, never to the storage
  that the hub redirects to, and never into a message.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from agent.cache.errors import CacheError, SourceError
from agent.cache.sources import Listing, RemoteFile, make_listing

try:
    import huggingface_hub as hub
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )
except ImportError as missing:
    raise CacheError(
        "bad_source",
        "hf: models need huggingface_hub, which is not installed here: pip install huggingface_hub",
    ) from missing

_TIMEOUT_S = 30.0
_TRIES = 4
_EXPIRED = {401, 403, 404, 410}  # what storage may answer for an address that was signed long ago
_BUSY = {408, 429, 500, 502, 503, 504}

T = TypeVar("T")


class HubSource:
    """One model of the hub at one revision."""

    def __init__(self, repository: str, revision: str) -> None:
        self.name = f"the hub {constants.ENDPOINT}"
        self._repository = repository
        self._revision = revision  # a commit, once listed
        self._places: dict[str, str] = {}  # path -> where the hub redirected to
        self._asking: dict[str, threading.Lock] = {}  # by path
        self._lock = threading.Lock()
        self._closed = False

    def listing(self) -> Listing:
        """The files of the repository at its revision."""
        info = self._tried(self._info)
        self._revision = str(info.sha)
        return make_listing(self._revision, [_file(s) for s in info.siblings or ()])

    def _info(self) -> Any:
        return hub.HfApi(endpoint=constants.ENDPOINT).model_info(
            self._repository, revision=self._revision, files_metadata=True, timeout=_TIMEOUT_S
        )

    def read_into(self, file: RemoteFile, start: int, view: memoryview) -> None:
        """Fill `view` with the file's bytes from `start` on."""
        self._tried(lambda: self._range(file, start, view))

    def _range(self, file: RemoteFile, start: int, view: memoryview) -> None:
        url = self._place(file.path)
        headers = {"Range": f"bytes={start}-{start + len(view) - 1}", "Accept-Encoding": "identity"}
        if urlsplit(url).netloc == urlsplit(constants.ENDPOINT).netloc:
            headers |= build_hf_headers()
        with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as answer:
            if answer.status_code in _EXPIRED and self._forget(file.path, url):
                raise _Expired
            if answer.status_code >= 400:
                answer.read()
                hf_raise_for_status(answer)
            if answer.status_code != 206 and (start or len(view) != file.size_bytes):
                raise SourceError(
                    "unreachable", f"{self.name} does not serve ranges of {file.path}"
                )
            _fill(view, answer, file, self.name)

    def _place(self, path: str) -> str:
        """Where the file's bytes are: asked of the hub once a file, not once a range."""
        if self._closed:
            raise SourceError("cancelled", f"{self.name} is no longer asked")
        with self._lock:
            asking = self._asking.setdefault(path, threading.Lock())
        with asking:
            if path not in self._places:
                url = self._url(path)
                found = hub.get_hf_file_metadata(
                    url, timeout=_TIMEOUT_S, endpoint=constants.ENDPOINT
                )
                self._places[path] = urljoin(url, found.location)
            return self._places[path]

    def _forget(self, path: str, url: str) -> bool:
        """Whether `url`, which is refused, is a signed address that may just have expired."""
        with self._asking[path]:
            if self._places.get(path) == url:
                del self._places[path]
        return url != self._url(path)

    def _url(self, path: str) -> str:
        return hub.hf_hub_url(
            self._repository, path, revision=self._revision, endpoint=constants.ENDPOINT
        )

    def close(self) -> None:
        """Ask the hub no more."""
        self._closed = True

    # ------------------------------------------------------------------ errors

    def _tried(self, action: Callable[[], T]) -> T:
        """`action()`, again while the hub is busy or the connection breaks."""
        retrying = Retrying(
            retry=retry_if_exception(lambda e: not self._closed and _passes(e)),
            stop=stop_after_attempt(_TRIES),
            wait=wait_random_exponential(multiplier=0.2, max=10),
            reraise=True,
        )
        try:
            return retrying(action)
        except SourceError:
            raise
        except Exception as error:  # the library's own, and those of whichever HTTP client it has
            raise self._explained(error) from None

    def _explained(self, error: Exception) -> SourceError:
        what = f"{self._repository}@{self._revision}"
        status = _status(error)
        first = str(error).strip().split("\n")[0]
        if isinstance(error, errors.GatedRepoError):
            return SourceError(
                "unauthorized",
                f"{self.name} wants its licence for {self._repository} accepted: do that on its"
                " page, and set HF_TOKEN in the agent's environment to a token of that account",
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return SourceError(
                "not_found", f"{self.name} has no revision {self._revision!r} of {self._repository}"
            )
        if status == 404 or isinstance(error, errors.RepositoryNotFoundError):
            return SourceError(
                "not_found",
                f"{self.name} has no {what}, or does not show it here; check the name, and HF_TOKEN"
                " in the agent's environment if it is private",
            )
        if status in (401, 403):
            return SourceError(
                "unauthorized",
                f"{self.name} refused {what} with {status}: {_token_words()}",
            )
        return SourceError(
            "unreachable",
            f"{self.name} does not give {what} ({type(error).__name__}: {first}); check the"
            " network of this node, HF_ENDPOINT and https_proxy, or put the model on shared_dir",
        )


class _Expired(Exception):
    """The address that the hub redirected to no longer works: ask the hub again."""


def _file(sibling: Any) -> RemoteFile:
    if sibling.lfs:
        check = f"sha256:{sibling.lfs.sha256}"
    else:
        check = f"git-sha1:{sibling.blob_id}" if sibling.blob_id else ""
    size = sibling.lfs.size if sibling.lfs else sibling.size
    return RemoteFile(path=sibling.rfilename, size_bytes=int(size or 0), check=check)


def _fill(view: memoryview, answer: Any, file: RemoteFile, name: str) -> None:
    done = 0
    for block in answer.iter_raw():
        take = min(len(block), len(view) - done)
        view[done : done + take] = block[:take]
        done += take
    if done < len(view):
        raise ConnectionError(f"{name} ended {file.path} early")


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _passes(error: BaseException) -> bool:
    """Whether trying again may help."""
    if isinstance(error, SourceError):
        return False
    status = _status(error) if isinstance(error, Exception) else None
    return status is None or status in _BUSY


def _token_words() -> str:
    if hub.get_token() is None:
        return "there is no token; set HF_TOKEN in the agent's environment"
    return "its token is wrong or may not read this; set HF_TOKEN in the agent's environment"
