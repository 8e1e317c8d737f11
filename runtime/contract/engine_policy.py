"""What of a spec reaches out of its engine: environment variables, and hosts media come from. Pure.

A spec asks, the node's operator allows (`agent.engine_env`, `agent.media_domains`), and some names
are nobody's to set: they are Stoker's own, or would have the process run other code.

Rule this file keeps: what is not passed on is a problem that names it, never dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from runtime.places import is_numeric
from runtime.wire.agent_messages import SpecProblem
from runtime.wire.model_spec import ModelSpec

# What an engine may get where `agent.engine_env` is left out: the knobs of what it is made of.
ENGINE_ENV = (
    "NCCL_*", "GLOO_*", "UCX_*", "TORCH_*", "PYTORCH_*", "OMP_*", "KMP_*", "MKL_*", "VLLM_*",
    "TOKENIZERS_PARALLELISM", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING",
)  # fmt: skip
# Set for each engine by Stoker: a second opinion would break routing, accounting or the guard.
_OWNED = (
    "STOKER_*", "SPT_NOENV", "CUDA_VISIBLE_DEVICES", "VLLM_API_KEY", "VLLM_CACHE_ROOT",
    "VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_MEDIA_CONNECTOR",
    "VLLM_MEDIA_CACHE", "VLLM_MEDIA_URL_ALLOW_REDIRECTS", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK",
    "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HF_HUB_OFFLINE",
)  # fmt: skip
# Would run other code in the engine, or load other libraries into it.
_CODE = (
    "PATH", "HOME", "LD_*", "PYTHON*", "GCONV_PATH", "BASH_ENV", "ENV", "IFS", "SHELL",
    "VLLM_PLUGINS", "VLLM_ALLOW_INSECURE_SERIALIZATION", "NCCL_*PLUGIN*", "VLLM_NCCL_SO_PATH",
    "VLLM_*_RESOLVER*",
)  # fmt: skip
# What Stoker sets unless a spec does: an agent's own value would be overridden without a word.
DEFAULTED = frozenset({
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_USE_AOT_COMPILE",
    "VLLM_LOGGING_COLOR", "NO_COLOR",
})  # fmt: skip
MAX_VALUE_CHARS = 4096


def env_problems(env: Mapping[str, str]) -> Iterator[SpecProblem]:
    """What no node would pass on, whatever it allows."""
    for name, value in env.items():
        field = f"env.{name}"
        if _matches(name, _OWNED):
            fix = "leave it out; see engine_args, or the node's configuration"
            yield SpecProblem(field=field, message="is set by Stoker", fix=fix)
        elif _matches(name, _CODE):
            fix = "set it up on the node, in the environment that agent.engine_python is of"
            yield SpecProblem(field=field, message="decides which code an engine runs", fix=fix)
        elif "\0" in value or len(value) > MAX_VALUE_CHARS:
            message = f"has a value with a zero byte, or of more than {MAX_VALUE_CHARS} characters"
            yield SpecProblem(field=field, message=message, fix="write a shorter text")


def node_problems(
    spec: ModelSpec, engine_env: Sequence[str], media_domains: Sequence[str]
) -> list[SpecProblem]:
    """What of a spec this node's operator does not allow."""
    problems = [
        SpecProblem(
            field=f"env.{name}", message="is not for engines of this node",
            fix="allow it there with agent.engine_env, patterns of names such as 'NCCL_*'",
        )
        for name in spec.env
        if not _matches(name, engine_env)
    ]  # fmt: skip
    return problems + [
        SpecProblem(
            field="media_domains", value=domain, message="is not for engines of this node",
            fix="allow it there with agent.media_domains, patterns of hosts",
        )
        for domain in spec.media_domains
        if not _host_matches(domain, media_domains)
    ]  # fmt: skip


def passed(environ: Mapping[str, str], engine_env: Sequence[str]) -> dict[str, str]:
    """What of an agent's own environment its engines get for these patterns."""
    return {
        name: value
        for name, value in environ.items()
        if _matches(name, engine_env) and not _is_reserved(name)
    }


def dropped(environ: Mapping[str, str], engine_env: Sequence[str]) -> list[str]:
    """Names in an agent's own environment that were meant for engines, and do not reach them."""
    meant = (name for name in environ if _matches(name, (*ENGINE_ENV, "CUDA_*", "TRITON_*")))
    return sorted(name for name in meant if name not in passed(environ, engine_env))


def _is_reserved(name: str) -> bool:
    return name in DEFAULTED or _matches(name, _OWNED) or _matches(name, _CODE)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _host_matches(host: str, patterns: Iterable[str]) -> bool:
    """A pattern with a wildcard means names: an address must be written out."""
    if is_numeric(host):
        return host in patterns
    return _matches(host, patterns)
