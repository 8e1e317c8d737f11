"""Jobs over HTTP: `Prefer: respond-async` on /invoke, and GET and DELETE of /jobs/{id}.

Rules this file keeps:
- a job is its caller's tenant's; the id of one that the caller may not see is not found;
- what is accepted is a request of its caller's, within its scope and limits, like any other.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from aiohttp import web

from runtime import places
from runtime.contract.config import RouterConfig
from runtime.router.call.body import Invocation
from runtime.router.callers.keys import Keys
from runtime.router.jobs.handlers.requests import (
    caller_of,
    check_webhook,
    counted,
    not_found,
    owner_of,
    shown,
    too_many,
    webhook_problem,
)
from runtime.router.jobs.invokes import WINDOW_S
from runtime.router.jobs.metrics import JobMetrics
from runtime.router.jobs.store import job_rows, shapes
from runtime.router.jobs.store.database import JobStore

WEBHOOK_HEADER = "X-Stoker-Webhook"


class JobHandlers:
    """`/jobs`. `wake`: there is work."""

    def __init__(
        self,
        store: JobStore,
        settings: RouterConfig,
        keys: Keys,
        metrics: JobMetrics,
        wake: Callable[[], None],
    ) -> None:
        self._store = store
        self._settings = settings
        self._keys = keys
        self._metrics = metrics
        self._wake = wake

    def routes(self) -> list[web.RouteDef]:
        """For the application."""
        return [web.get("/jobs/{id}", self._job), web.delete("/jobs/{id}", self._delete_job)]

    def wanted(self, request: web.Request) -> bool:
        """Whether a call is to be answered later. Raises CallError (400) for a webhook it may not
        have."""
        webhook = request.headers.get(WEBHOOK_HEADER)
        if not _prefers_async(request):
            if webhook is not None:
                raise webhook_problem(WEBHOOK_HEADER, "needs the header Prefer: respond-async")
            return False
        check_webhook(WEBHOOK_HEADER, webhook, self._settings)
        return True

    async def accept(self, request: web.Request, call: Invocation) -> web.Response:
        """202 and the job that makes `call`, which its caller's scope allows."""
        async with counted(request, self._keys):
            return await self._keep(request, call)

    async def _keep(self, request: web.Request, call: Invocation) -> web.Response:
        caller, most = caller_of(request), self._settings.jobs_per_tenant
        await self._store.check_room(caller.tenant, len(call.body))
        if await self._store.read(job_rows.waiting, caller.tenant) >= most:
            raise too_many("jobs", most)
        row = await self._store.write_within(
            caller.tenant, len(call.body), job_rows.insert,
            f"job_{secrets.token_hex(12)}", caller.tenant, caller.key_id, caller.priority,
            call.head.model, call.path, call.body,
            request.headers.get(WEBHOOK_HEADER), time.time(), WINDOW_S,
        )  # fmt: skip
        self._metrics.job("created")
        self._wake()
        headers = {
            "Location": places.url("", "jobs", row.id),
            "Preference-Applied": "respond-async",
        }
        return shown(shapes.job_object(row, None), 202, headers)

    async def _job(self, request: web.Request) -> web.Response:
        owner, job_id = owner_of(request), request.match_info["id"]
        found = await self._store.read(job_rows.with_answer, owner, job_id)
        if found is None:
            raise not_found("job", job_id)
        return shown(shapes.job_object(*found))

    async def _delete_job(self, request: web.Request) -> web.Response:
        """Cancel it, or forget its answer."""
        owner, job_id = owner_of(request), request.match_info["id"]
        row = await self._store.read(job_rows.get, owner, job_id)
        if row is None:
            raise not_found("job", job_id)
        keep_s = self._settings.results_keep_s
        if await self._store.write(
            job_rows.end, row.seq, "cancelled", None, None, time.time(), keep_s
        ):
            self._metrics.job("cancelled")
            self._wake()
            return await self._job(request)
        await self._store.write(job_rows.delete, row.seq)
        return shown({"id": row.id, "object": "job", "deleted": True})


def _prefers_async(request: web.Request) -> bool:
    wishes = ",".join(request.headers.getall("Prefer", ())).split(",")
    return any(wish.partition(";")[0].strip().lower() == "respond-async" for wish in wishes)
