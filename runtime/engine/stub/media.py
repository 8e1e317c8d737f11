"""Which URLs in a body the stub would fetch as vLLM does: none but of hosts it was told. Pure.

It fetches nothing itself; a URL that vLLM would refuse is refused here, in vLLM's words.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any
from urllib.parse import urlsplit

_FIELDS = ("image_url", "video_url", "audio_url", "file_url")


def refusal(body: Any, domains: Collection[str]) -> str | None:
    """Why a decoded body is refused; None: every URL in it may be fetched, or is data."""
    for url in _urls(body):
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            continue
        if scheme == "file":
            return "Cannot load local files without `--allowed-local-media-path`."
        if scheme not in ("http", "https"):
            return "The URL must be either a HTTP, data or file URL."
        if (host := _host(url)) not in domains:
            return (
                f"The URL must be from one of the allowed domains: {sorted(domains)}. Input URL"
                f" domain: {host}"
            )
    return None


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _urls(body: Any) -> Iterator[str]:
    """In whichever protocol's parts: {"image_url": {"url"}}, {"image_url": ""}, {"source"}."""
    left = [body]
    while left:
        found = left.pop()
        if isinstance(found, list):
            left.extend(found)
        elif isinstance(found, dict):
            for name in _FIELDS:
                value = found.get(name)
                url = value.get("url") if isinstance(value, dict) else value
                if isinstance(url, str):
                    yield url
            source = found.get("source")
            if isinstance(source, dict) and isinstance(source.get("url"), str):
                yield source["url"]
            left.extend(found.values())
