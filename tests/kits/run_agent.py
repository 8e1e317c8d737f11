"""`python -m tests.kits.run_agent CONFIG.json`: a node agent as a process of its own.

Prints its URL once it answers. With STOKER_TEST_FAMILY set, its stub engine has a child that
ignores SIGTERM and outlives it, as vLLM's EngineCore does when its API server is killed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
import uvloop

import agent.engines.launch_plan
from agent.driver import run_agent
from runtime.contract.config import Config
from runtime.engine.select import get_engine
from runtime.logs import set_up_logging
from runtime.registry.embedded import EmbeddedRegistry

_CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
_PARENT = (
    "import os, subprocess, sys;"
    f" subprocess.Popen([sys.executable, '-c', {_CHILD!r}]);"
    " os.execv(sys.argv[1], sys.argv[1:])"
)


class FamilyEngine:
    """The stub with a child."""

    def __init__(self, name: str) -> None:
        self._stub = get_engine(name)

    def launch(self, spec, ctx):
        launch = self._stub.launch(spec, ctx)
        argv = (sys.executable, "-c", _PARENT, *launch.argv)
        return msgspec.structs.replace(launch, argv=argv)

    def shell_key(self, spec, ctx, version):
        return self._stub.shell_key(spec, ctx, version)


async def main() -> None:
    config = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Config)
    registry = EmbeddedRegistry(config.registry_file())
    await run_agent(config, registry, on_ready=lambda url: print(url, flush=True))
    await registry.close()


if __name__ == "__main__":
    if os.environ.get("STOKER_TEST_FAMILY"):
        vars(agent.engines.launch_plan)["get_engine"] = FamilyEngine
    set_up_logging("agent")
    uvloop.run(main())
