"""Which unfinished uploads below a prefix are this destination's own: each has a record beside it, an upload as well.

A store lists unfinished uploads by key and id, and says of none who began it. What it does tell is a key, so a record
is an upload without a byte whose key names the other:

    <prefix>/.mergefleet-uploads/<attempt>/<upload id>/<name>

It is begun before the first part is sent, is as invisible as what it names, and ends after it. A process that finds
one, on any machine, knows the upload for an attempt at this destination; uploads without one are strangers'. See
decision 17.
"""

import logging
from urllib.parse import quote, unquote

from botocore.exceptions import ClientError

from workers.sources.s3_client import S3Store, error_code

logger = logging.getLogger(__name__)

RECORDS = ".mergefleet-uploads"
"""No file of a release has such a name: those begin with a letter or a digit."""


def record_name(attempt: str, name: str, upload_id: str) -> str:
    """Return the name, below the prefix, of the record of an upload."""
    return f"{RECORDS}/{attempt}/{quote(upload_id, safe='')}/{name}"


def begin_record(store: S3Store, attempt: str, name: str, upload_id: str) -> str:
    """Record an unfinished upload, so that any later attempt may abort it.

    Returns:
        The id of the record itself.
    """
    key = store.key(record_name(attempt, name, upload_id))
    return store.client.create_multipart_upload(Bucket=store.place.bucket, Key=key)["UploadId"]


def end_record(store: S3Store, attempt: str, name: str, upload_id: str, record_id: str) -> None:
    """End the record of an upload that is completed or aborted."""
    _abort(store, record_name(attempt, name, upload_id), record_id)


def abort_upload(store: S3Store, name: str, upload_id: str) -> None:
    """Abort an unfinished upload; none is fine."""
    _abort(store, name, upload_id)


def abort_recorded(store: S3Store) -> int:
    """Abort the unfinished uploads that attempts at this destination have recorded, and end their records.

    Returns:
        How many uploads were recorded.
    """
    start = store.key(f"{RECORDS}/")
    with store.errors():
        pages = store.client.get_paginator("list_multipart_uploads").paginate(Bucket=store.place.bucket, Prefix=start)
        records = [(entry["Key"], entry["UploadId"]) for page in pages for entry in page.get("Uploads", [])]
        num_aborted = 0
        for key, record_id in records:
            _, _, recorded = key.removeprefix(start).partition("/")
            quoted, _, name = recorded.partition("/")
            if name:
                abort_upload(store, name, unquote(quoted))
                num_aborted += 1
            _abort(store, key.removeprefix(store.key("")), record_id)
    if num_aborted:
        logger.info("aborted unfinished uploads", extra={"place": str(store.place), "uploads": num_aborted})
    return num_aborted


def _abort(store: S3Store, name: str, upload_id: str) -> None:
    try:
        store.client.abort_multipart_upload(Bucket=store.place.bucket, Key=store.key(name), UploadId=upload_id)
    except ClientError as error:
        if error_code(error) != "NoSuchUpload":
            raise
