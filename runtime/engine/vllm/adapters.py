"""Adapters inside vLLM: loaded when a request first names them.

vLLM loads this with `--middleware runtime.engine.vllm.adapters.Guard`, before it looks which
resolvers there are: importing it adds ours. vLLM itself keeps `max_loras` on the device and
`max_cpu_loras` in host memory, and drops those used longest ago.
"""

from __future__ import annotations

import os
from typing import Any

from fastapi import HTTPException
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from runtime.engine import guard
from runtime.engine.adapter_index import RETRY_AFTER_S, Index, NotYet, from_environment

_RETRY_AFTER = (b"retry-after", b"%d" % RETRY_AFTER_S)


class Guard(guard.Guard):
    """The guard, which also says when to come back: vLLM's error handler drops such headers."""

    async def __call__(self, scope: guard.Scope, receive: guard.Receive, send: guard.Send) -> None:
        async def send_on(message: guard.Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 503:
                message["headers"] = [*message.get("headers", ()), _RETRY_AFTER]
            await send(message)

        await super().__call__(scope, receive, send_on)


class Resolver(LoRAResolver):
    """Finds adapters in the index that the agent keeps."""

    def __init__(self, index: Index) -> None:
        self._index = index

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """See vLLM. Raises HTTPException (503) for one that is not here yet."""
        try:
            folder = await self._index.find(lora_name)
        except NotYet as error:
            raise HTTPException(503, detail=str(error)) from None
        if folder is None:
            return None
        # The number is vLLM's to give.
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=folder)


def _watch(kind: Any) -> None:
    """Have that base of vLLM's handlers serve no other model than the request was let in for."""
    checked = kind.__dict__["_check_model"]

    async def check_model(self: Any, request: Any) -> Any:
        if words := guard.other_model(request.model):
            raise HTTPException(403, detail=words)
        return await checked(self, request)

    kind._check_model = check_model


# All handlers ask one of these two before they look for an adapter; a vLLM in which they have other
# names does not start.
_watch(BaseServing)
_watch(PoolingBaseServing)

if own := from_environment(os.environ):
    LoRAResolverRegistry.register_resolver("stoker", Resolver(own))
