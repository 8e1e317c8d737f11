"""Loaded into vLLM's own pytest (`-p stoker_vllm_plugin`): its tests get a running server.

`RemoteOpenAIServer(model, arguments)` of vLLM's tests starts `vllm serve`; here it only points at
$STOKER_SERVER_URL, whatever the arguments. What a test needs of them it does not find, at either
server: such cases fail at both, and tell nothing of the router.
"""

import importlib
import os
import sys
import types
from urllib.parse import urlsplit

import pytest


def _stand_in(name, **attributes):
    """An empty module, for a package that these tests import and do not use here."""
    try:
        importlib.import_module(name)
    except ImportError:
        module = types.ModuleType(name)
        for attribute, value in attributes.items():
            setattr(module, attribute, value)
        sys.modules[name] = module


_stand_in("tblib", pickling_support=types.SimpleNamespace(install=lambda: None))


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    utils = importlib.import_module("tests.utils")
    where = urlsplit(os.environ["STOKER_SERVER_URL"])

    def point(self, model, vllm_serve_args=(), **options):
        self.uds, self.host, self.port = None, where.hostname, where.port
        self.show_hidden_metrics = False
        self.proc = None

    for name in ("RemoteVLLMServer", "RemoteOpenAIServer"):
        kind = getattr(utils, name)
        kind.__init__ = point
        kind._shutdown = lambda self: None
    utils.RemoteVLLMServer.DUMMY_API_KEY = os.environ["STOKER_SERVER_KEY"]


def pytest_collection_modifyitems(config, items):
    """Keep the cases that talk to a server."""
    kept = [item for item in items if any("server" in name for name in item.fixturenames)]
    dropped = [item for item in items if item not in kept]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
    items[:] = kept


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request):
    """Adapters would be fetched from the hub, for a server that is not started here."""
    if fixturedef.argname.endswith("_lora_files"):
        fixturedef.cached_result = ("unused", fixturedef.cache_key(request), None)
        return "unused"
    return None
