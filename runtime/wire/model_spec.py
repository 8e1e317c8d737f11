"""A model as its owner declares it, in parts. Pure.

Units are the last word of a name."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from runtime.wire.names import AdapterName, Alias, EnvName, Floor, HostName, Name


class PrewarmWindow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From each time of `cron` on, for `for_s` seconds, the model stands at least on `rung`."""

    cron: Annotated[str, Meta(description="minute hour day month weekday, e.g. '0 8 * * 1-5'")]
    for_s: Annotated[float, Meta(gt=0, description="for how long, e.g. 36000 for ten hours")]
    timezone: Annotated[str, Meta(description="an IANA name, e.g. Europe/Berlin")] = "UTC"
    rung: Annotated[Floor, Meta(description="hot, asleep or staged")] = "hot"


class Prewarm(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How warm a model is kept although nobody calls it."""

    min_warm: Annotated[
        Floor | None,
        Meta(description="hot, asleep or staged: never colder than this; left out: no limit"),
    ] = None
    schedule: Annotated[
        tuple[PrewarmWindow, ...], Meta(description="times at which to be warm already")
    ] = ()


class Placement(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where replicas of a model may run."""

    labels: Annotated[
        dict[str, str], Meta(description="a node must have all of these labels, e.g. {zone: a}")
    ] = {}
    devices: Annotated[
        tuple[str, ...],
        Meta(description="a device's name must match one of these patterns, e.g. '*H100*'"),
    ] = ()
    min_compute_capability: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="of a GPU, e.g. 8.9; devices that do not tell theirs are left out"),
    ] = None
    spread: Annotated[
        Literal["prefer", "node", "off"],
        Meta(
            description="prefer: replicas on different nodes where there is room; node: never two"
            " on one node; off: not cared for"
        ),
    ] = "prefer"


ScaleMetric = Literal["queue_depth", "concurrency", "gpu_utilization", "kv_cache_usage", "ttft_p95"]


class ScaleTarget(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One figure to hold, as a metric of Kubernetes' HorizontalPodAutoscaler."""

    metric: Annotated[
        ScaleMetric,
        Meta(
            description="queue_depth and concurrency: requests a replica; gpu_utilization and"
            " kv_cache_usage: 0 to 1; ttft_p95: seconds"
        ),
    ]
    target: Annotated[float, Meta(gt=0, description="the value to hold")]


class ScalePolicy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much may change within a period: `value` per cent of the replicas, or so many."""

    type: Literal["percent", "count"]
    value: Annotated[float, Meta(gt=0)]
    period_s: Annotated[float, Meta(gt=0, le=1800)]


class ScaleRules(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One direction's policies: the one that allows most counts."""

    policies: tuple[ScalePolicy, ...] = ()
    stabilization_s: Annotated[float, Meta(ge=0, le=3600)] = 0.0


class Autoscale(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a model gets more replicas and when it gives some back.

    scheduler/signals/replica_target.py has the rules.
    """

    metrics: Annotated[
        tuple[ScaleTarget, ...],
        Meta(description="the largest wish counts; left out: concurrency at target_concurrency"),
    ] = ()
    up: ScaleRules = ScaleRules(
        policies=(ScalePolicy(type="percent", value=100, period_s=30.0),), stabilization_s=60.0
    )
    down: ScaleRules = ScaleRules(
        policies=(ScalePolicy(type="percent", value=50, period_s=60.0),), stabilization_s=300.0
    )
    panic_window_s: Annotated[
        float, Meta(ge=0, description="a burst is looked for within this; 0: never panic")
    ] = 6.0
    panic_threshold: Annotated[
        float, Meta(gt=1, description="panic at this many times what the ready replicas can take")
    ] = 2.0


class ResponseCaching(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether a model's answers are kept to be given again."""

    ttl_s: Annotated[
        float, Meta(gt=0, le=2592000, description="how long an answer is given again")
    ] = 3600.0
    shared: Annotated[
        bool, Meta(description="a tenant may get the answer to another's request of the same words")
    ] = False


class Batching(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Calls that arrive one by one are sent to the engine together."""

    max_batch_size: Annotated[int, Meta(ge=2, le=1024, description="calls in one request")] = 32
    max_wait_ms: Annotated[
        float, Meta(gt=0, le=1000, description="how long the first of them waits for others")
    ] = 5.0
    endpoints: Annotated[
        tuple[Literal["embeddings", "completions"], ...],
        Meta(min_length=1, description="which calls; completions only where they are not streamed"),
    ] = ("embeddings",)


class ModelSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model as its owner declares it. `runtime.contract.spec_file` reads and checks it."""

    name: Annotated[Name, Meta(description="the model's name in every API")]
    source: Annotated[
        str,
        Meta(
            min_length=1,
            description="where the weights are: a local folder, hf:org/name[@revision] or s3://…",
        ),
    ]
    engine: Annotated[
        Literal["vllm", "stub"],
        Meta(description="vllm, or stub: a labelled stand-in with modelled timings"),
    ] = "vllm"
    aliases: Annotated[tuple[Alias, ...], Meta(description="other names that mean this model")] = ()
    adapters: Annotated[
        dict[AdapterName, str],
        Meta(
            description="LoRA adapters by name, each with its source (as the model's own): `sql` of"
            " model `m` is called as `m:sql`"
        ),
    ] = {}
    engine_args: Annotated[
        dict[str, Any],
        Meta(description="passed to the engine: `max_model_len: 4096` is --max-model-len 4096"),
    ] = {}
    env: Annotated[
        dict[EnvName, str],
        Meta(
            description="environment of the engine, e.g. NCCL_P2P_DISABLE: '1'; the node's"
            " agent.engine_env says which names it may get"
        ),
    ] = {}
    media_domains: Annotated[
        tuple[HostName, ...],
        Meta(
            max_length=64,
            description="hosts that images, video and audio of requests may be fetched from, as far"
            " as the node's agent.media_domains allows; left out: none, only data: URLs",
        ),
    ] = ()
    device_memory_bytes: Annotated[
        Annotated[int, Meta(gt=0)] | None,
        Meta(
            description="memory one replica books on its devices, all together, e.g. 12GiB;"
            " estimated from the model's files when left out"
        ),
    ] = None
    tensor_parallel_size: Annotated[
        int, Meta(ge=1, le=64, description="devices of one node that one replica spans")
    ] = 1
    min_replicas: Annotated[int, Meta(ge=0, le=1024, description="kept running even when idle")] = 0
    max_replicas: Annotated[int, Meta(ge=1, le=1024, description="never more than this")] = 1
    idle_s: Annotated[
        float, Meta(gt=0, description="seconds without a request before a replica steps down")
    ] = 300.0
    asleep_s: Annotated[
        float,
        Meta(gt=0, description="seconds a replica sleeps unused before it is stopped"),
    ] = 3600.0
    staged_s: Annotated[
        float,
        Meta(gt=0, description="seconds a stopped model's weights are kept in host memory"),
    ] = 21600.0
    sleep: Annotated[
        Literal["auto", "off"],
        Meta(description="auto: an idle or evicted replica sleeps where its engine can; or off"),
    ] = "auto"
    snapshot: Annotated[
        Literal["off", "auto"],
        Meta(
            description="auto: the engine's process image is kept on disk where the host allows it"
        ),
    ] = "off"
    placement: Annotated[Placement, Meta(description="where its replicas may run")] = Placement()
    autoscale: Annotated[
        Autoscale, Meta(description="how its number of replicas follows demand")
    ] = Autoscale()
    forecast: Annotated[
        Literal["auto", "off"],
        Meta(description="auto: warmed ahead of calls that its history lets expect; or off"),
    ] = "auto"
    prewarm: Annotated[
        Prewarm, Meta(description="how warm it is kept although nobody calls it")
    ] = Prewarm()
    priority: Annotated[
        int, Meta(ge=-100, le=100, description="higher is evicted later; 0 is usual")
    ] = 0
    hold_s: Annotated[
        float, Meta(gt=0, le=3600, description="how long a request may wait for a cold start")
    ] = 300.0
    target_concurrency: Annotated[
        int, Meta(ge=1, description="requests one replica should have in flight")
    ] = 16
    max_queue: Annotated[
        int, Meta(ge=1, description="requests that may wait at one router; more get 429")
    ] = 1024
    affinity: Annotated[
        Literal["prefix", "off"],
        Meta(
            description="prefix: calls of one session or beginning go to the replica that has read"
            " it before, unless that is busier than others; off: always the least loaded"
        ),
    ] = "prefix"

    response_cache: Annotated[
        ResponseCaching | None,
        Meta(
            description="answers to exact repeats are kept (embeddings; temperature 0 or a seed);"
            " left out: none are"
        ),
    ] = None

    batching: Annotated[
        Batching | None,
        Meta(description="calls that arrive one by one share a request to the engine; off"),
    ] = None

    hedge_after_ms: Annotated[
        Annotated[float, Meta(gt=0, le=60000)] | None,
        Meta(
            description="embeddings, scores and ranks that take longer are asked of a second"
            " replica too, within the retry budget; left out: never"
        ),
    ] = None

    def names(self) -> tuple[str, ...]:
        """The name and every alias."""
        return (self.name, *self.aliases)

    def adapter_names(self) -> tuple[str, ...]:
        """What callers name each adapter by: `name:adapter`."""
        return tuple(f"{self.name}:{adapter}" for adapter in self.adapters)

    def launch_key(self) -> str:
        """Twelve hex digits that change when a running replica no longer matches this spec.

        Only what the engine process is started with counts: changing `idle_s` restarts nothing, nor
        does another adapter, as long as the engine's own arguments have room for its rank.
        """
        launch = (
            self.name,
            self.aliases,
            self.source,
            self.engine,
            self.engine_args,
            self.env,
            self.media_domains,
            self.device_memory_bytes,
            self.tensor_parallel_size,
            self.sleep,
        )
        return hashlib.sha256(msgspec.json.encode(launch, order="sorted")).hexdigest()[:12]

    def booked_bytes(self) -> int:
        """Bytes one replica books on *each* of its devices, rounded up.

        Raises ValueError where the spec has neither a declared nor an estimated size; the
        scheduler's API fills the estimate in before a spec reaches the core.
        """
        if self.device_memory_bytes is None:
            raise ValueError(f"{self.name}: device_memory_bytes is neither declared nor estimated")
        return -(-self.device_memory_bytes // self.tensor_parallel_size)
