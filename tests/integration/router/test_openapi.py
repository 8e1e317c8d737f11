"""The router's OpenAPI document: valid, complete, and kept to under schemathesis' requests."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from openapi_spec_validator import validate

from runtime.router.call.paths import PLAIN_PATHS
from tests.kits import router_stack as kit
from tests.kits.router_stack import unary

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance"
)


async def test_the_document_is_valid_and_the_page_shows_all_of_it(tmp_path: Path) -> None:
    async with kit.stack(tmp_path) as stack:
        async with stack.session.get(stack.url + "/openapi.json") as response:
            assert response.status == 200
            document = await response.json()
        validate(document)
        assert document["openapi"].startswith("3.1")
        assert set(PLAIN_PATHS.values()) <= set(document["paths"])
        async with stack.session.get(stack.url + "/docs") as response:
            page = await response.text()
            assert response.content_type == "text/html"
        assert all(path in page for path in document["paths"])
        assert "http://" not in page
        assert "https://" not in page


async def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    async with kit.stack(tmp_path) as stack:
        await stack.serve("m", await stack.engine(unary()), aliases=("0", "org/m"))
        program = Path(sys.executable).with_name("schemathesis")
        argv = (
            program, "run", stack.url + "/openapi.json", "--checks", CHECKS, "--no-color",
            "--max-examples", "5", "--phases", "examples,coverage,fuzzing", "--workers", "2",
            "--generation-deterministic", "--request-timeout", "10",
        )  # fmt: skip
        process = await asyncio.create_subprocess_exec(
            *map(str, argv), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path,
            env={**os.environ, "NO_PROXY": "*"},
        )  # fmt: skip
        output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()[-6000:]
