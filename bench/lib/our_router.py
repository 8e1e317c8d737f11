"""Stoker's router in front of one engine, with all its features on and nothing else there: it
serves by its last route table. `python our_router.py ORIGIN_PORT STATE_DIR [MAX_IN_FLIGHT
MAX_QUEUE]` prints its port.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import uvloop

from runtime.config import Config, RouterConfig
from runtime.registry import RegistryError
from runtime.router import table_file
from runtime.router.driver import run_router
from runtime.wire import Endpoint, ModelRoute, RouteTable


class NoRegistry:
    """A registry that is down."""

    def __getattr__(self, name: str) -> object:
        async def refuse(*args: object, **options: object) -> None:
            raise RegistryError("there is none")

        return refuse


def main() -> None:
    logging.getLogger("stoker").setLevel(logging.ERROR)  # that all else is down is meant
    state_dir = sys.argv[2]
    limits = [int(text) for text in sys.argv[3:5]] or [4096, 1024]
    engine = Endpoint(replica_id="r1", base_url=f"http://127.0.0.1:{sys.argv[1]}", key="engine-key")
    table = RouteTable(
        version=1,
        models=(ModelRoute(name="bench", warmth="hot", endpoints=(engine,), max_queue=limits[1]),),
    )
    table_file.save(Path(state_dir) / "routes.json", table)
    config = Config(
        state_dir=state_dir, cluster_token="t", router=RouterConfig(port=0, max_in_flight=limits[0])
    )

    def ready(url: str) -> None:
        print(url.rsplit(":", 1)[1], flush=True)

    uvloop.run(run_router(config, NoRegistry(), on_ready=ready))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
