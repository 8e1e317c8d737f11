"""Asks the nodes what they think of a new spec: bad engine arguments, and the memory it takes."""

from __future__ import annotations

from dataclasses import dataclass

import aiohttp
import msgspec

from runtime.outside import decode
from runtime.places import url
from runtime.wire.agent_messages import Inspection, MemoryEstimate, SpecProblem
from runtime.wire.model_spec import ModelSpec
from scheduler.agent_calls import AgentCalls
from scheduler.core.decisions import Core

INSPECT_TIMEOUT_S = 120.0  # the first look imports vLLM once to read its own option table
MAX_NODES = 3  # nodes asked before the estimate is given up


@dataclass(frozen=True, slots=True)
class Findings:
    """What the nodes said, together."""

    problems: tuple[SpecProblem, ...] = ()
    estimate: MemoryEstimate | None = None
    checked_against: str | None = None
    notes: tuple[str, ...] = ()
    lora_rank: int = 0


async def inspect_spec(core: Core, agents: AgentCalls, spec: ModelSpec, *, fetch: bool) -> Findings:
    """Problems make the spec unacceptable; notes do not.

    `fetch`: nodes may fetch what they need to know more, such as an adapter for its rank.
    """
    best: Inspection | None = None
    notes: list[str] = []
    for node in [n for n in core.state.nodes.values() if n.live][:MAX_NODES]:
        try:
            answer = await _ask(agents, node.node_id, spec, fetch)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            notes.append(f"node {node.node_id} could not check it: {error or type(error).__name__}")
            continue
        if answer.problems:
            return Findings(problems=answer.problems, checked_against=answer.checked_against)
        if best is None or (best.estimate is None and answer.estimate is not None):
            best = answer
        if best.estimate is not None:
            break
    if best is None:
        best = Inspection(estimate_error="; ".join(notes) or "no node is up")
        if not notes:
            notes.append("no node was up to check its engine arguments")
    if best.estimate is None and spec.device_memory_bytes is None:
        problem = SpecProblem(
            field="device_memory_bytes",
            message=f"is not declared and cannot be estimated: {best.estimate_error}",
            fix="declare it, e.g. device_memory_bytes: 12GiB",
        )
        return Findings(problems=(problem,), notes=tuple(notes))
    if best.estimate_error and spec.engine != "stub":  # the stub has nothing to be estimated by
        notes.append(f"its memory could not be estimated: {best.estimate_error}")
    notes += [f"it will most likely not start: {words}" for words in best.warnings]
    return Findings((), best.estimate, best.checked_against, tuple(notes), best.lora_rank)


async def _ask(agents: AgentCalls, node_id: str, spec: ModelSpec, fetch: bool) -> Inspection:
    timeout = aiohttp.ClientTimeout(total=INSPECT_TIMEOUT_S, connect=3)
    where = url(agents.address(node_id) or "", "agent", "inspect", fetch=int(fetch))
    data = msgspec.json.encode(spec)
    async with agents.http.post(where, data=data, timeout=timeout) as response:
        body = await response.read()
        if response.status != 200:
            raise ValueError(f"HTTP {response.status}: {body[:200].decode(errors='replace')}")
        return decode(body, Inspection)
