"""An S3-compatible object store as an origin of models. The only file that knows boto3.

Credentials, region and endpoint are boto3's usual ones: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_REGION, AWS_ENDPOINT_URL (for a store that is not Amazon's), ~/.aws, or the instance's role.

Rules this file keeps:
- every range is asked for with the listed ETag, so a file that changes meanwhile is noticed;
- an ETag that is an MD5 (one part, not KMS-encrypted) is checked against the bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from agent.cache.errors import CacheError, SourceError
from agent.cache.sources import Listing, RemoteFile, make_listing

try:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        NoCredentialsError,
    )
except ImportError as missing:
    raise CacheError(
        "bad_source",
        "s3:// models need boto3, which is not installed here: pip install 'stoker-serve[s3]'",
    ) from missing

_MD5 = re.compile(r"[0-9a-f]{32}")
_READ_BYTES = 2**20
_DENIED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
_MISSING = {"404", "NoSuchBucket", "NoSuchKey"}


class S3Source:
    """All objects below one prefix."""

    def __init__(self, source: str) -> None:
        """`source`: s3://bucket/prefix"""
        self.name = source
        self._bucket, _, prefix = source.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix.rstrip('/')}/"
        self._closed = False
        try:
            # One client for all threads: clients are thread-safe, sessions are not.
            self._client = boto3.session.Session().client(
                "s3",
                config=Config(
                    retries={"mode": "standard", "max_attempts": 4},
                    connect_timeout=10,
                    read_timeout=30,
                    max_pool_connections=32,
                ),
            )
        except (BotoCoreError, ValueError) as error:
            raise CacheError("bad_source", f"{source}: {error}") from None

    def listing(self) -> Listing:
        """The objects below the prefix."""
        try:
            files = [self._file(found) for found in self._objects()]
        except (BotoCoreError, ClientError) as error:
            raise self._explained(error) from None
        if not files:
            raise SourceError("not_found", f"{self.name} has no files; check bucket and path")
        return make_listing("", files)

    def _objects(self) -> Iterator[dict[str, Any]]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix
        )
        for page in pages:
            yield from (o for o in page.get("Contents", ()) if not o["Key"].endswith("/"))

    def _file(self, found: dict[str, Any]) -> RemoteFile:
        return RemoteFile(
            path=found["Key"].removeprefix(self._prefix),
            size_bytes=int(found["Size"]),
            check=self._check(found),
            tag=str(found["ETag"]),
        )

    def _check(self, found: dict[str, Any]) -> str:
        etag = found["ETag"].strip('"')
        if not _MD5.fullmatch(etag):
            return ""
        head = self._client.head_object(Bucket=self._bucket, Key=found["Key"])
        plain = not str(head.get("ServerSideEncryption", "")).startswith("aws:kms")
        return f"md5:{etag}" if plain and "SSECustomerAlgorithm" not in head else ""

    def read_into(self, file: RemoteFile, start: int, view: memoryview) -> None:
        """Fill `view` with the object's bytes from `start` on."""
        if self._closed:
            raise SourceError("cancelled", f"{self.name} is no longer asked")
        try:
            body = self._client.get_object(
                Bucket=self._bucket,
                Key=self._prefix + file.path,
                Range=f"bytes={start}-{start + len(view) - 1}",
                IfMatch=file.tag,
            )["Body"]
            done = 0
            for block in body.iter_chunks(_READ_BYTES):
                view[done : done + len(block)] = block
                done += len(block)
        except (BotoCoreError, ClientError, OSError) as error:
            raise self._explained(error) from None

    def close(self) -> None:
        """Ask the store no more."""
        self._closed = True

    def _explained(self, error: Exception) -> SourceError:
        code = error.response["Error"]["Code"] if isinstance(error, ClientError) else ""
        if isinstance(error, NoCredentialsError) or code in _DENIED:
            return SourceError(
                "unauthorized",
                f"{self.name}: the store refuses access ({code or 'no credentials'}); set"
                " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the agent's environment to a key"
                " that may list and read it",
            )
        if code in _MISSING:
            return SourceError("not_found", f"{self.name}: {error}; check bucket and path")
        if code in ("412", "PreconditionFailed"):
            return SourceError(
                "corrupt", f"{self.name} was changed while it was pulled; pull it again"
            )
        return SourceError(
            "unreachable",
            f"{self.name} can't be read ({type(error).__name__}: {error}); check the network of"
            " this node and AWS_ENDPOINT_URL",
        )
