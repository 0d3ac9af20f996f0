"""The one place where an S3 client is made, objects are listed and read, and what a store answers becomes our errors.

Credentials, region and endpoint are boto3's own business: `AWS_*` variables, profiles, instance roles.
"""

import contextlib
import copy
import functools
import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Self

import boto3.session
import botocore.loaders
import botocore.session
from botocore import exceptions as botocore_errors
from botocore.config import Config

from jobs.errors import (
    AuthError,
    BadInputError,
    MergefleetError,
    NoCapacityError,
    NotFoundError,
    TransientIOError,
    UnsupportedError,
)
from jobs.locations import S3Prefix
from jobs.places import bucket_place
from workers.files.local import CHUNK_BYTES

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_NUM_STREAMS = 4
_READ_ATTEMPTS = 3

_CREDENTIALS = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or AWS_PROFILE"
_BY_CODE: dict[str, type[MergefleetError]] = {
    "BadDigest": TransientIOError,  # what arrived is not what was sent
    "ExpiredToken": AuthError,
    "InvalidToken": AuthError,
    "NoSuchUpload": TransientIOError,  # another client aborted it: the next attempt starts over
    "QuotaExceeded": NoCapacityError,
    "RequestTimeout": TransientIOError,
    "RequestTimeTooSkewed": TransientIOError,
    "XAmzContentChecksumMismatch": TransientIOError,
}
_OF_THE_STORE = frozenset({"RequestTimeout", "RequestTimeTooSkewed", "SlowDown", "Throttling", "ThrottlingException"})
_BY_STATUS: dict[int, type[MergefleetError]] = {
    401: AuthError,
    403: AuthError,
    404: NotFoundError,
    409: TransientIOError,  # two requests for one key at the same time
    412: TransientIOError,  # the object changed between two requests
    429: TransientIOError,
    501: UnsupportedError,
    507: NoCapacityError,
}
_HINTS: dict[type[MergefleetError], str] = {
    AuthError: f"check {_CREDENTIALS}, and what they are allowed to do",
    NoCapacityError: "free some space, or raise the quota",
    UnsupportedError: "the store lacks what safe publishing needs",
}
_DENIED = (
    botocore_errors.NoCredentialsError,
    botocore_errors.PartialCredentialsError,
    botocore_errors.CredentialRetrievalError,
    botocore_errors.ProfileNotFound,
    botocore_errors.TokenRetrievalError,
    botocore_errors.SSOError,
)
_INTERRUPTED = (
    botocore_errors.ConnectionError,
    botocore_errors.HTTPClientError,
    botocore_errors.IncompleteReadError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Object:
    """One object below a prefix."""

    name: str
    """Relative to the prefix."""
    num_bytes: int
    etag: str
    """The store's name for these bytes, quotes included."""


@functools.cache
def _loader() -> botocore.loaders.Loader:
    """Return botocore's service descriptions, read once in a process: nine tenths of the time to make a client."""
    return botocore.loaders.create_loader()


class S3Store:
    """A client for what lies below one prefix. May be used by several threads."""

    def __init__(self, place: S3Prefix) -> None:
        self.place = place
        config = Config(retries={"mode": "standard"}, connect_timeout=10, read_timeout=60, max_pool_connections=32)
        try:
            # A session of its own: the default one remembers the credentials it met first, for good.
            core = botocore.session.get_session()
            core.register_component("data_loader", _loader())
            self.client: S3Client = boto3.session.Session(botocore_session=core).client("s3", config=config)
        except (botocore_errors.BotoCoreError, ValueError) as error:
            raise self._translate(error) from error

    def at(self, place: S3Prefix) -> Self:
        """Return the same client for what lies below another prefix."""
        other = copy.copy(self)
        other.place = place
        return other

    def key(self, name: str) -> str:
        """Return the key of a name below the prefix."""
        return f"{self.place.prefix}/{name}"

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what botocore raises inside into our errors.

        Raises:
            NotFoundError, AuthError, NoCapacityError, TransientIOError, UnsupportedError, BadInputError: by fault.
        """
        try:
            yield
        except (botocore_errors.ClientError, botocore_errors.BotoCoreError) as error:
            raise self._translate(error) from error

    def objects(self) -> dict[str, S3Object]:
        """List what lies below the prefix, by name. Folder markers, which some consoles make, are left out."""
        start = self.key("")
        with self.errors():
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.place.bucket, Prefix=start)
            found = [entry for page in pages for entry in page.get("Contents", [])]
        return {
            name: S3Object(name=name, num_bytes=entry["Size"], etag=entry["ETag"])
            for entry in found
            if (name := entry["Key"].removeprefix(start)) and not name.endswith("/")
        }

    def level(self) -> tuple[list[str], list[S3Object]]:
        """List what lies right below the prefix: names of folders, and objects without what is in those."""
        start = self.key("")
        asked = {"Bucket": self.place.bucket, "Prefix": start, "Delimiter": "/"}
        with self.errors():
            pages = list(self.client.get_paginator("list_objects_v2").paginate(**asked))  # type: ignore[arg-type]
        folders = [
            entry["Prefix"].removeprefix(start).rstrip("/")
            for page in pages
            for entry in page.get("CommonPrefixes", [])
        ]
        objects = [
            S3Object(name=name, num_bytes=entry["Size"], etag=entry["ETag"])
            for page in pages
            for entry in page.get("Contents", [])
            if (name := entry["Key"].removeprefix(start))
        ]
        return [name for name in folders if name], objects

    def content(self, name: str, max_bytes: int) -> bytes | None:
        """Return the bytes of a small object, or None when there is none; of a larger one, one byte too many."""
        with self.errors():
            try:
                body = self.client.get_object(Bucket=self.place.bucket, Key=self.key(name))["Body"]
            except botocore_errors.ClientError as error:
                if error_code(error) == "NoSuchKey":
                    return None
                raise
            with contextlib.closing(body):
                return body.read(max_bytes + 1)

    def delete(self, name: str, etag: str) -> None:
        """Delete an object, if it is the one that was looked at; none, or another one by now, is fine.

        Stores that know no conditional deletes take the condition for nothing, or say so.
        """
        with self.errors():
            try:
                self.client.delete_object(Bucket=self.place.bucket, Key=self.key(name), IfMatch=etag)
            except botocore_errors.ClientError as error:
                status = error_status(error)
                if status == HTTPStatus.NOT_IMPLEMENTED:
                    self.client.delete_object(Bucket=self.place.bucket, Key=self.key(name))
                elif status not in (HTTPStatus.NOT_FOUND, HTTPStatus.PRECONDITION_FAILED):
                    raise

    def read(self, entry: S3Object) -> Iterator[bytes]:
        """Yield the bytes of an object in order, fetched as ranges, a few at a time, and all of one version.

        Raises:
            TransientIOError: the object changed meanwhile, or the connection broke again and again.
        """
        spans = ((at, min(at + CHUNK_BYTES, entry.num_bytes)) for at in range(0, entry.num_bytes, CHUNK_BYTES))
        waiting: deque[Future[bytes]] = deque()
        with ThreadPoolExecutor(_NUM_STREAMS, thread_name_prefix="s3-read") as pool:
            try:
                waiting.extend(
                    pool.submit(self._read_span, entry, span) for span in itertools.islice(spans, _NUM_STREAMS)
                )
                while waiting:
                    yield waiting.popleft().result()
                    waiting.extend(pool.submit(self._read_span, entry, span) for span in itertools.islice(spans, 1))
            finally:
                for future in waiting:
                    future.cancel()

    def read_start(self, entry: S3Object, num_bytes: int) -> bytes:
        """Return the first bytes of an object, all of one version; raises as `read`."""
        end = min(num_bytes, entry.num_bytes)
        return self._read_span(entry, (0, end)) if end else b""

    def _read_span(self, entry: S3Object, span: tuple[int, int]) -> bytes:
        start, end = span
        with self.errors():
            for attempt in itertools.count(1):
                # The client retries requests, but not bodies that break off.
                try:
                    answer = self.client.get_object(
                        Bucket=self.place.bucket,
                        Key=self.key(entry.name),
                        Range=f"bytes={start}-{end - 1}",
                        IfMatch=entry.etag,
                    )
                    data = answer["Body"].read()
                    break
                except _INTERRUPTED:
                    if attempt == _READ_ATTEMPTS:
                        raise
        if len(data) != end - start:
            raise TransientIOError(f"{self.place}/{entry.name}: asked for {end - start} bytes, got {len(data)}")
        return data

    def _translate(self, error: Exception) -> MergefleetError:
        ours = self._ours(error)
        return ours.at(bucket_place(self.place.bucket)) if _is_of_the_store(error, ours) else ours

    def _ours(self, error: Exception) -> MergefleetError:
        if isinstance(error, botocore_errors.ClientError):
            return self._translate_answer(error)
        if isinstance(error, _DENIED):
            return AuthError(f"{self.place}: {error}; set {_CREDENTIALS}")
        if isinstance(error, _INTERRUPTED):
            return TransientIOError(
                f"{self.place}: {self.client.meta.endpoint_url} did not answer ({type(error).__name__}); "
                "check AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL and the network"
            )
        return BadInputError(f"{self.place}: {error}; check the AWS_* variables")

    def _translate_answer(self, error: botocore_errors.ClientError) -> MergefleetError:
        code, status = error_code(error), error_status(error)
        if code == "NoSuchBucket":
            endpoint = self.client.meta.endpoint_url
            return NotFoundError(
                f"bucket {self.place.bucket!r} does not exist at {endpoint}: create it, or correct the name"
            )
        kind = _BY_CODE.get(code) or _BY_STATUS.get(status) or (TransientIOError if status >= 500 else BadInputError)
        if kind in (NotFoundError, BadInputError) and _says_no_reason(error):
            return TransientIOError(f"{self.place}: {error.operation_name} answered {status} without a reason")
        message = error.response["Error"].get("Message", "")
        said = f"{self.place}: {error.operation_name} answered {status} {code}: {message}"
        return kind(f"{said}; {_HINTS[kind]}" if kind in _HINTS else said)


def _is_of_the_store(error: Exception, ours: MergefleetError) -> bool:
    """Whether an error is the bucket's or the store's, and not that of one object or of what was asked."""
    if isinstance(ours, TransientIOError) and isinstance(error, botocore_errors.ClientError):
        status = error_status(error)
        is_busy = status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR
        return is_busy or error_code(error) in _OF_THE_STORE or _says_no_reason(error)
    return isinstance(ours, AuthError | NoCapacityError | TransientIOError)


def _says_no_reason(error: botocore_errors.ClientError) -> bool:
    """Whether an answer has no more than its status, where a store says why: it is half of one, or a gateway's.

    Nothing follows from it about what was asked for. Answers to HEAD never have a body.
    """
    return error_code(error) in ("", str(error_status(error))) and not error.operation_name.startswith("Head")


def error_code(error: botocore_errors.ClientError) -> str:
    """Return the code of an answer: S3's own, or the HTTP status where the answer has no body to say it."""
    return error.response["Error"].get("Code", "")


def error_status(error: botocore_errors.ClientError) -> int:
    """Return the HTTP status of an answer."""
    return error.response["ResponseMetadata"]["HTTPStatusCode"]
