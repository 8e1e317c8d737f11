"""The files of a checkpoint: which hold its weights, and what their headers say.

Rules this file keeps: only headers are read; another file is named, with the reason.
"""

from __future__ import annotations

import struct
from pathlib import Path

from msgspec import Struct

from runtime import outside, places

INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 * 2**20  # safetensors' own limit


class Tensor(Struct, frozen=True):
    """One tensor as its file declares it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def shards(folder: Path) -> list[Path]:
    """The files that make up the model; an index decides, since some repositories hold it twice."""
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            names = set(outside.model_json(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{index} is not a safetensors index") from None
        return [places.below(folder, str(name)) for name in sorted(names)]
    files = sorted(folder.glob("*.safetensors"))
    return [f for f in files if not f.name.startswith("consolidated")] or files


def read_header(file: Path) -> list[Tensor]:
    """The tensors of a safetensors file. Raises ValueError for an invalid file, or one cut off."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, MAX_HEADER_BYTES):
                raise ValueError(f"it declares a header of {length} bytes")
            header = outside.model_json(stream.read(length))
        header.pop("__metadata__", None)
        due = max((about["data_offsets"][1] for about in header.values()), default=0)
        tensors = [_tensor(name, about) for name, about in header.items()]
    except FileNotFoundError:
        raise ValueError(f"{file} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{file} is not a safetensors file: {error!r}") from None
    if due > size - 8 - length:
        left = size - 8 - length
        raise ValueError(f"{file} is cut off: {left} bytes of tensors where {due} are due")
    return tensors


def _tensor(name: str, about: dict[str, list[int]]) -> Tensor:
    begin, end = about["data_offsets"]
    return Tensor(name, str(about["dtype"]), tuple(about["shape"]), end - begin)


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model; empty without safetensors. Raises ValueError."""
    return {t.name: t.shape for file in shards(folder) for t in read_header(file)}
