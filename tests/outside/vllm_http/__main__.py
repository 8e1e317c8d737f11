"""Runs vLLM's own HTTP tests against a plain vLLM and against the router; prints the differences.

    python -m tests.outside.vllm_http SOURCE [--only WORD]

SOURCE is an unpacked source archive of the vLLM that is installed here, fetched by whoever runs
this (`pip download --no-deps --no-binary :all: vllm==…`); nothing of it is copied into the
repository. Both servers serve one tiny random model, on this host's CPU or GPU, under every name
that the tests ask for. Many cases fail at both, as they want what only their own server has: they
are compared by the exception and the status that they fail with. Exit status 0: each difference is
one of expected.yaml, and each of those was seen.

Rule this file keeps: a case differs only if it does so twice; a model of random weights gives
answers that some tests like at one time and not at another.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import requests
import yaml

from runtime.checkpoints.tiny_models import write_model
from runtime.engine.vllm.arguments import to_flags
from tests.kits.cluster import running

HERE = Path(__file__).parent
EXPECTED = HERE / "expected.yaml"
# Those of vLLM 0.32 that need only a server of one text model, below tests/entrypoints.
FILES = (
    "anthropic/test_messages.py",
    "generate/generative_scoring/test_generative_scoring_e2e.py",
    "openai/chat_completion/test_batched_chat_completions.py",
    "openai/chat_completion/test_chat.py",
    "openai/chat_completion/test_chat_completion.py",
    "openai/chat_completion/test_chat_echo.py",
    "openai/chat_completion/test_chat_logit_bias_validation.py",
    "openai/chat_completion/test_completion_with_function_calling.py",
    "openai/chat_completion/test_enable_force_include_usage.py",
    "openai/chat_completion/test_extra_content_fields.py",
    "openai/chat_completion/test_include_reasoning.py",
    "openai/chat_completion/test_logprob_token_ids.py",
    "openai/chat_completion/test_non_object_body_validation.py",
    "openai/chat_completion/test_serving_chat.py",
    "openai/completion/test_completion.py",
    "openai/completion/test_prompt_validation.py",
    "openai/completion/test_token_in_token_out.py",
    "openai/models/test_models.py",
    "openai/responses/test_basic.py",
    "openai/responses/test_simple.py",
    "openai/responses/test_stateful.py",
    "openai/test_chunked_prompt.py",
    "openai/test_return_token_ids.py",
    "openai/test_return_tokens_as_ids.py",
    "serve/instrumentator/test_basic.py",
    "serve/instrumentator/test_metrics.py",
    "serve/sagemaker/test_sagemaker_handler_overrides.py",
    "serve/sagemaker/test_sagemaker_middleware_integration.py",
    "serve/tokenize/test_tokenization.py",
)
ARGS = {
    "enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 32, "dtype": "bfloat16",
    "enable_auto_tool_choice": True, "tool_call_parser": "hermes",
    "enable_prompt_tokens_details": True, "enable_tokenizer_info_endpoint": True,
}  # fmt: skip
START_S = 300.0
# As Stoker starts it on a host without a GPU, so that two engines can share the cores.
CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
}
# The names that the tests ask for: constants, `--served-model-name` and names of adapters.
_MODEL = re.compile(
    r'^[A-Z_]*MODEL[A-Z_]* *= *"([^"]+)"|"--served-model-name",\s*"([^"]+)"|"(zephyr-lora)"',
    re.MULTILINE,
)
# Of what a failed case says: the exception, and the status that an answer had.
_EXCEPTION = re.compile(r"[A-Za-z_.]+")
_STATUS = re.compile(r"(?:Error code: |status[_ ]?(?:code)?\D{0,3}|assert )([1-5]\d\d)\b")
Outcomes = dict[str, str]  # case -> passed, skipped, or how it failed


class Difference(NamedTuple):
    """A case that came out differently."""

    case: str
    plain: str
    router: str


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.outside.vllm_http")
    parser.add_argument("source", type=Path, help="an unpacked source archive of vLLM")
    parser.add_argument("--only", default="", help="run the files with this in their path")
    options = parser.parse_args()
    files = [f for f in FILES if options.only in f]
    folder = options.source / "tests" / "entrypoints"
    missing = [f for f in files if not (folder / f).exists()]
    if not folder.is_dir() or not files:
        parser.error(f"{options.source} has no tests/entrypoints, or --only names none of FILES")
    for name in missing:
        print(f"not in this vLLM: {name}")
    with tempfile.TemporaryDirectory(prefix="vllm-http-") as work:
        return _compare(Path(work), options.source, [f for f in files if f not in missing])


def _compare(work: Path, source: Path, files: Sequence[str]) -> int:
    shutil.copytree(source / "tests", work / "tests")  # so that the installed vllm is imported
    shutil.copy(source / "pyproject.toml", work)
    texts = ((source / "tests" / "entrypoints" / f).read_text() for f in files)
    models = (name for text in texts for groups in _MODEL.findall(text) for name in groups)
    names = sorted(set(filter(None, models)))
    model = write_model(work / "models", "tiny")
    with _hub(work, model, names) as environ:
        with _plain(model, names) as url:
            plain = _outcomes(work, files, url, environ)
        with _router(work, model, names) as url:
            router = _outcomes(work, files, url, environ)
            differ = [case for case in plain if plain[case] != router.get(case, "missing")]
            again = _outcomes(work, differ, url, environ) if differ else {}
        unsteady = {c for c in differ if again.get(c) == plain[c]}
        if differ:
            with _plain(model, names) as url:
                second = _outcomes(work, differ, url, environ)
            unsteady |= {c for c in differ if second.get(c, plain[c]) != plain[c]}
    found = [Difference(c, plain[c], router.get(c, "missing")) for c in differ]
    return _report(plain, router, [d for d in found if d.case not in unsteady], unsteady)


def _report(
    plain: Outcomes, router: Outcomes, differences: Sequence[Difference], unsteady: set[str]
) -> int:
    expected: Mapping[str, str] = yaml.safe_load(EXPECTED.read_text()) or {}
    for name, outcomes in (("plain vLLM", plain), ("the router", router)):
        count = sum(outcome == "passed" for outcome in outcomes.values())
        print(f"{name}: {count} of {len(outcomes)} passed")
    for case in sorted(unsteady):
        print(f"unsteady, not counted: {case}")
    seen = set()
    for case, at_plain, at_router in differences:
        why = next((why for start, why in expected.items() if case.startswith(start)), None)
        seen |= {start for start in expected if case.startswith(start)}
        print(f"{'expected' if why else 'DIFFERS '} {at_plain} -> {at_router}: {case}")
        if why:
            print(f"         {why}")
    tried = {start for start in expected if any(case.startswith(start) for case in plain)}
    for start in sorted(tried - seen):
        print(f"no more a difference, take it out of {EXPECTED.name}: {start}")
    wrong = [d for d in differences if not any(d.case.startswith(start) for start in expected)]
    print(f"{len(differences)} differences, {len(wrong)} of them not expected")
    return 1 if wrong or tried - seen else 0


def _outcomes(work: Path, tests: Sequence[str], url: str, environ: Mapping[str, str]) -> Outcomes:
    """What became of each case of these files, or of these cases."""
    report = work / "report.xml"
    report.unlink(missing_ok=True)
    names = [t if t.startswith("tests/") else f"tests/entrypoints/{t}" for t in tests]
    argv = [
        sys.executable, "-m", "pytest", "-p", "stoker_vllm_plugin", "-p", "no:cacheprovider", "-q",
        "-x" if not names else "--continue-on-collection-errors", "--timeout=120", "--tb=no",
        "-o", "addopts=", "-o", "junit_family=xunit1",
        f"--junit-xml={report}", *names,
    ]  # fmt: skip
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("STOKER_", "PYTEST_"))}
    paths = f"{work}{os.pathsep}{HERE / 'plugin'}"
    more = {"PYTHONPATH": paths, "STOKER_SERVER_URL": url, "STOKER_SERVER_KEY": "unused"}
    done = subprocess.run(
        argv, cwd=work, env={**clean, **environ, **more}, check=False, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if not report.exists():
        raise SystemExit(f"vLLM's tests did not run:\n{done.stdout[-4000:]}")
    return _parsed(report)


def _parsed(report: Path) -> Outcomes:
    outcomes = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        file, place = case.get("file", ""), case.get("classname", "")
        within = place.removeprefix(file.removesuffix(".py").replace("/", ".")).split(".")
        name = "::".join((file, *filter(None, within), case.get("name", "")))
        outcomes[name] = next(filter(None, map(_outcome, case)), "passed")
    return outcomes


def _outcome(child: ET.Element) -> str | None:
    """What an element of a case says of it, e.g. "failure (NotFoundError 404)"."""
    if child.tag not in ("error", "failure"):
        return "skipped" if child.tag == "skipped" else None
    message = child.get("message", "")
    exception, status = _EXCEPTION.match(message), _STATUS.search(message)
    words = [exception[0].rpartition(".")[2] if exception else "", status[1] if status else ""]
    return f"{child.tag} ({' '.join(filter(None, words))})"


# -------------------------------------------------------------------------------- the servers


@contextlib.contextmanager
def _hub(work: Path, model: Path, names: Sequence[str]) -> Iterator[Mapping[str, str]]:
    """A cache of the hub in which each of these names is the tiny model."""
    for name in names:
        if "/" in name:
            repo = work / "hub" / "hub" / f"models--{name.replace('/', '--')}"
            (repo / "snapshots").mkdir(parents=True)
            (repo / "refs").mkdir()
            (repo / "refs" / "main").write_text("0" * 40)
            (repo / "snapshots" / ("0" * 40)).symlink_to(model)
    yield {"HF_HOME": str(work / "hub"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@contextlib.contextmanager
def _plain(model: Path, names: Sequence[str]) -> Iterator[str]:
    """vLLM's own server, as its users start it."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    argv = [  # not `vllm serve`, which the CPU build's package does not have
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", *names, "--host", "127.0.0.1", "--port", str(port),
        *to_flags(ARGS),
    ]  # fmt: skip
    log = model.parent / "plain.log"
    environ = {**os.environ, **CPU, "PYTHONPATH": ""}
    with log.open("w") as out:
        process = subprocess.Popen(
            argv, stdout=out, stderr=subprocess.STDOUT, env=environ, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _until_healthy(url + "/health", process, log)
            yield url
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


def _until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the plain vLLM ended:\n{log.read_text()[-4000:]}")
        with contextlib.suppress(requests.ConnectionError):
            if requests.get(url, timeout=5).ok:
                return
        time.sleep(0.5)
    raise SystemExit(f"the plain vLLM was not ready in {START_S:g} s:\n{log.read_text()[-4000:]}")


@contextlib.contextmanager
def _router(work: Path, model: Path, names: Sequence[str]) -> Iterator[str]:
    """`stoker up` with the same model, warm."""
    first, *aliases = names
    with running(work / "state") as cluster:
        spec: dict[str, Any] = {
            "name": "tiny", "source": str(model), "aliases": [first, *aliases],
            "engine_args": ARGS, "device_memory_bytes": "3GiB", "min_replicas": 1,
        }  # fmt: skip
        headers = {"Authorization": f"Bearer {cluster.up['token']}"}
        added = requests.post(  # the agent asks vLLM for its arguments first, which takes a while
            cluster.up["admin"] + "/admin/models", json=spec, headers=headers, timeout=START_S
        )
        if not added.ok:
            raise SystemExit(f"the model was not added: {added.text}")
        body: dict[str, Any] = {"model": first, "prompt": "a", "max_tokens": 1}
        answer = requests.post(cluster.router + "/v1/completions", json=body, timeout=START_S)
        if not answer.ok:
            raise SystemExit(f"the router's model did not start: {answer.text}")
        yield cluster.router


if __name__ == "__main__":
    sys.exit(main())
