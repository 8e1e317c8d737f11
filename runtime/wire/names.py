"""How models, nodes, devices and their like may be named, and what a size is. Pure."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from msgspec import Meta

# Python's `$` also matches before a last newline: `(?!\n)` is what JSON Schema's `$` means.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$(?!\n)"
ALIAS_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,191}$(?!\n)"
ADAPTER_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$(?!\n)"
REPLICA_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")  # it names files and addresses

Bytes = Annotated[int, Meta(ge=0)]
Name = Annotated[
    str,
    Meta(
        pattern=NAME_PATTERN,
        description="1 to 96 letters, digits, '.', '_' or '-', the first a letter or digit",
    ),
]
Alias = Annotated[
    str,
    Meta(
        pattern=ALIAS_PATTERN,
        description="1 to 192 letters, digits or any of . _ : / @ -, the first a letter or digit",
    ),
]


AdapterName = Annotated[
    str,
    Meta(
        pattern=ADAPTER_PATTERN,
        description="1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit",
    ),
]


EnvName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Z_][A-Z0-9_]{0,127}$(?!\n)",
        description="1 to 128 capital letters, digits or '_', the first no digit",
    ),
]
HostName = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$(?!\n)",
        description="a host in small letters, e.g. img.example.com",
    ),
]

# They name entries of the registry, and segments of the admin API's addresses.
NODE_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,252}$(?!\n)"
NodeId = Annotated[
    str,
    Meta(
        pattern=NODE_PATTERN,
        description="letters, digits, '.', '_', ':' or '-', the first a letter or digit",
    ),
]
DeviceId = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._: -]{0,252}$(?!\n)",
        description="letters, digits, spaces, '.', '_', ':' or '-', the first a letter or digit",
    ),
]

Floor = Literal["hot", "asleep", "staged"]
