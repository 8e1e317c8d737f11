"""A registration for the tests of registries."""

from __future__ import annotations

from runtime.registry.protocol import Service


def service(base: str, suffix: str = "1", **changes: object) -> Service:
    fields: dict[str, object] = {
        "service_id": f"{base}-{suffix}",
        "name": base,
        "address": "127.0.0.1",
        "port": 4000,
        "meta": {"url": "http://127.0.0.1:4000/é?a=b&c", "version": "0.1.0", "empty": ""},
    }
    return Service(**{**fields, **changes})  # type: ignore[arg-type]
