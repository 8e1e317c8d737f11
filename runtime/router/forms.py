"""A multipart form with its `model` replaced, every other byte as it came. Pure.

Rule this file keeps: a form without a `model` of its own, or that can't be read, stays as it is.
"""

from __future__ import annotations

import re

_BOUNDARY = re.compile(r'boundary=(?:"([^"]+)"|([^\s;]+))', re.IGNORECASE)
_IS_MODEL = re.compile(
    rb'^content-disposition:\s*form-data\s*;(?:[^\r\n]*;)?\s*name="?model"?\s*(;|\r?$)',
    re.IGNORECASE | re.MULTILINE,
)


def form_with_model(body: bytes, content_type: str, model: str) -> bytes:
    """`body`, of that Content-Type, with the value of each field `model` replaced."""
    found = _BOUNDARY.search(content_type)
    if found is None:
        return body
    boundary = b"--" + (found[1] or found[2]).encode("latin-1")
    parts = body.split(b"\r\n" + boundary)
    for index, part in enumerate(parts):
        head, blank, _ = part.partition(b"\r\n\r\n")
        if blank and _IS_MODEL.search(head):
            parts[index] = head + blank + model.encode()
    return (b"\r\n" + boundary).join(parts)
