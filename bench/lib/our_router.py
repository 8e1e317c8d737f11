"""Stoker's router in front of one engine, with all its features on and nothing else there: it
serves by its last tables. `python our_router.py ORIGIN_PORT STATE_DIR keys|log|open [MAX_IN_FLIGHT
MAX_QUEUE]` prints its port. keys: nobody without one, and the callers' has limits that are not
reached; log: an access log too; open: no keys at all.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import uvloop

from bench.lib.http_load import KEY, SCARCE_KEY
from runtime.contract.access import (
    KEY_PREFIX,
    KeySpec,
    KeyTable,
    Limits,
    StoredKey,
    digest,
    token_id,
)
from runtime.contract.config import Config, RouterConfig
from runtime.registry.protocol import RegistryError
from runtime.router.control import saved_tables
from runtime.router.driver import run_router
from runtime.wire.routes import Endpoint, ModelRoute, RouteTable


class NoRegistry:
    """A registry that is down."""

    def __getattr__(self, name: str) -> object:
        async def refuse(*args: object, **options: object) -> None:
            raise RegistryError("there is none")

        return refuse


def _keys() -> tuple[StoredKey, ...]:
    """The callers' key, held to every limit there is, and one that may do little."""
    limits = Limits(
        requests_per_min=10**9, tokens_per_min=10**12, concurrent=10**6, tokens_per_day=10**15,
        gpu_s_per_day=1e9,
    )  # fmt: skip
    return _key(KEY, "bench", limits), _key(SCARCE_KEY, "scarce", Limits(requests_per_min=10))


def _key(token: str, tenant: str, limits: Limits) -> StoredKey:
    key_id = token_id(token, KEY_PREFIX)
    assert key_id is not None
    spec = KeySpec(tenant=tenant, limits=limits)
    return StoredKey(key_id=key_id, digest=digest(token), spec=spec, created_at=0.0)


def main() -> None:
    logging.getLogger("stoker").setLevel(logging.ERROR)  # that all else is down is meant
    state_dir = sys.argv[2]
    kind = sys.argv[3]
    limits = [int(text) for text in sys.argv[4:6]] or [4096, 1024]
    engine = Endpoint(replica_id="r1", base_url=f"http://127.0.0.1:{sys.argv[1]}", key="engine-key")
    table = RouteTable(
        version=1,
        models=(
            ModelRoute(
                name="bench", warmth="hot", endpoints=(engine,), max_queue=limits[1],
                target_concurrency=limits[0],
            ),
        ),
    )  # fmt: skip
    saved_tables.save(Path(state_dir) / "routes.json", table)
    if kind != "open":
        saved_tables.save(Path(state_dir) / "keys.json", KeyTable(version=1, keys=_keys()))
    settings = RouterConfig(
        port=0,
        max_in_flight=limits[0],
        anonymous="on" if kind == "open" else "off",
        access_log=str(Path(state_dir) / "access.log") if kind == "log" else "",
    )
    config = Config(state_dir=state_dir, cluster_token="t", router=settings)

    def ready(url: str) -> None:
        print(url.rsplit(":", 1)[1], flush=True)

    uvloop.run(run_router(config, NoRegistry(), on_ready=ready))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
