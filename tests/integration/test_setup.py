"""scripts/setup.sh where the package index is not the one of the machine it was written on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kits.checkout import ROOT
from tests.kits.package_index import Checkout, index, pin, torch, wheel

Clone = Callable[..., Checkout]
NOBODY = "http://127.0.0.1:9"  # the discard port: refused at once


class Wheels:
    def __init__(self, folder: Path) -> None:
        self.tool = wheel(folder, "buildtool", "1")
        self.library = wheel(folder, "library", "1")
        self.torch_cpu = torch(folder, "2.13.0+cpu", None)
        self.torch_cuda = torch(folder, "2.13.0", "13.0")
        self.triton = wheel(folder, "triton", "3")
        self.common = (self.tool, self.library)
        self.cuda = (self.torch_cuda, self.triton)

    def locks(self) -> dict[str, str]:
        return {
            "base": pin(self.library),
            "build": pin(self.tool),
            "cpu": pin(self.library),
            "torch-cpu": "torch==2.13.0+cpu\n",
            "torch-cuda": pin(*self.cuda),
            "vllm": pin(self.library, *self.cuda),
        }


@pytest.fixture
def wheels(tmp_path: Path) -> Wheels:
    return Wheels(tmp_path / "wheels")


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("venv") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=240)
    return folder


@pytest.fixture
def clone(tmp_path: Path, venv: Path, wheels: Wheels) -> Clone:
    """Makes a clone; `locks` stand in for some of its lock files."""

    def make(pytorch_index: str = NOBODY, **locks: str) -> Checkout:
        return Checkout(tmp_path / "clone", venv, wheels.locks() | locks, pytorch_index)

    return make


@pytest.fixture
def pytorch(tmp_path: Path, wheels: Wheels) -> Iterator[str]:
    """PyTorch's own index of CPU builds."""
    with index(tmp_path / "pytorch", wheels.torch_cpu) as url:
        yield url


def test_the_cpu_build_of_torch_comes_from_pytorchs_index(
    tmp_path: Path, wheels: Wheels, clone: Clone, pytorch: str
) -> None:
    checkout = clone(pytorch)
    with index(tmp_path / "pypi", *wheels.common, *wheels.cuda) as url:
        done = checkout.setup(url)
        assert done.returncode == 0, done.stderr
        assert checkout.version("torch") == "2.13.0+cpu"
        assert f"your package index has no torch==2.13.0+cpu; trying {pytorch}" in done.stdout
        assert checkout.setup(url).stdout == ""  # nothing is left to do


def test_an_index_that_has_the_cpu_build_is_enough(
    tmp_path: Path, wheels: Wheels, clone: Clone
) -> None:
    checkout = clone()
    with index(tmp_path / "pypi", *wheels.common, *wheels.cuda, wheels.torch_cpu) as url:
        done = checkout.setup(url)
    assert done.returncode == 0, done.stderr
    assert checkout.version("torch") == "2.13.0+cpu"


def test_where_no_index_has_it_the_build_for_gpus_is_taken(
    tmp_path: Path, wheels: Wheels, clone: Clone
) -> None:
    checkout = clone()
    with index(tmp_path / "pypi", *wheels.common, *wheels.cuda) as url:
        done = checkout.setup(url)
    assert done.returncode == 0, done.stderr
    assert (checkout.version("torch"), checkout.version("triton")) == ("2.13.0", "3")
    assert "about 3 GB" in done.stdout


def test_an_index_that_was_named_is_not_passed_over(
    tmp_path: Path, wheels: Wheels, clone: Clone
) -> None:
    checkout = clone()
    with index(tmp_path / "pypi", *wheels.common, *wheels.cuda) as url:
        done = checkout.setup(url, TORCH_INDEX_URL=f"{url}/nothing")
    assert done.returncode == 1
    assert f"can't be installed from TORCH_INDEX_URL={url}/nothing" in done.stderr
    assert checkout.version("torch") == ""


def test_no_torch_at_all_is_told_with_what_was_tried(
    tmp_path: Path, wheels: Wheels, clone: Clone
) -> None:
    checkout = clone()
    with index(tmp_path / "pypi", *wheels.common) as url:
        done = checkout.setup(url)
    assert done.returncode == 1
    assert "torch can't be installed" in done.stderr
    assert NOBODY in done.stderr
    assert "requirements/torch-cuda.txt" in done.stderr


def test_on_a_gpu_host_a_torch_without_cuda_is_refused_by_name(
    tmp_path: Path, wheels: Wheels, clone: Clone
) -> None:
    checkout = clone(vllm=pin(wheels.library, wheels.torch_cpu))
    with index(tmp_path / "pypi", *wheels.common, wheels.torch_cpu) as url:
        done = checkout.setup(url, ENGINE="vllm")
        assert done.returncode == 1
        assert "torch 2.13.0+cpu in .venv was built without CUDA" in done.stderr
        assert checkout.setup(url, ENGINE="vllm").returncode == 1  # and not taken for done


def test_on_a_gpu_host_a_torch_with_cuda_is_taken_where_both_are(
    tmp_path: Path, wheels: Wheels, clone: Clone
) -> None:
    checkout = clone()
    with index(tmp_path / "pypi", *wheels.common, *wheels.cuda, wheels.torch_cpu) as url:
        done = checkout.setup(url, ENGINE="vllm")
    assert done.returncode == 0, done.stderr
    assert checkout.version("torch") == "2.13.0"


def test_a_package_that_is_not_the_locked_one_is_refused(
    tmp_path: Path, wheels: Wheels, clone: Clone
) -> None:
    checkout = clone()
    other = wheel(
        tmp_path / "other", "library", "1", {"library.py": "import os  # not what was locked"}
    )
    with index(tmp_path / "pypi", wheels.tool, other) as url:
        done = checkout.setup(url)
    assert done.returncode != 0
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr
    assert checkout.version("library") == ""


@pytest.mark.parametrize("name", ["vllm", "torch-cuda"])
def test_a_lock_for_gpus_matches_no_cpu_build(name: str) -> None:
    """pip takes 2.13.0+cpu for a better match of ==2.13.0, and then complains of its hash."""
    assert "\ntorch===2.13.0 " in (ROOT / f"requirements/{name}.txt").read_text()


@pytest.mark.parametrize("name", ["base", "build", "cpu", "dev", "torch-cuda", "vllm"])
def test_every_package_of_a_lock_has_a_hash(name: str) -> None:
    lines = (ROOT / f"requirements/{name}.txt").read_text().replace("\\\n", " ").splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert pinned
    assert [line for line in pinned if "--hash=sha256:" not in line] == []
