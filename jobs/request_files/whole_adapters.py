"""Whether a folder holds an adapter, and all of it: while a training runs, its newest checkpoint is being written."""

import json
import re

from jobs.locations import Location
from jobs.request_files.patterns import Listing
from jobs.steps import in_order

_CONFIG = "adapter_config.json"
_WEIGHTS = re.compile(r"adapter_model.*\.(safetensors|bin)|adapters\.safetensors|adapter_(model|\d+)\.pt")
"""What PEFT, MLX and torchtune call them."""
_PART = re.compile(r"(adapter_model-)\d{5}(-of-(\d{5})\.(?:safetensors|bin))")
_START_BYTES = 64 << 10
"""More than the header of most adapters."""
_MAX_HEADER_BYTES = 32 << 20
_MAX_CONFIG_BYTES = 16 << 20
_MAX_INNER = 50
"""Folders of a folder that are looked into for adapters."""


def holds_config(place: Location, listing: Listing) -> bool:
    """Whether a folder is that of an adapter."""
    return _CONFIG in listing.files(place)


def inner_adapters(place: Location, listing: Listing) -> list[str]:
    """Return the folders of a folder that is there and hold adapters, as PEFT saves those that have names."""
    folders = sorted(listing.folders(place), key=in_order)[:_MAX_INNER]
    return [folder for folder in folders if holds_config(place.folder(folder), listing)]


def missing_of(place: Location, listing: Listing) -> str | None:
    """Return what the adapter of a folder lacks, in words; None when it is whole."""
    files = listing.files(place)
    if _CONFIG not in files:
        return f"has no {_CONFIG}"
    weights = sorted(filter(_WEIGHTS.fullmatch, files))
    if not weights:
        return f"has an {_CONFIG} and no weights"
    for part in filter(None, map(_PART.fullmatch, weights)):
        parts = (f"{part[1]}{number:05d}{part[2]}" for number in range(1, int(part[3]) + 1))
        if missing := next((each for each in parts if each not in files), None):
            return f"has no {missing}"
    if files[_CONFIG] > _MAX_CONFIG_BYTES:
        return f"has an {_CONFIG} of {files[_CONFIG]} bytes, more than {_MAX_CONFIG_BYTES}"
    if broken := _broken_config(listing.start(place, _CONFIG, files[_CONFIG])):
        return broken
    shards = (name for name in weights if name.endswith(".safetensors"))
    return next(filter(None, (_cut(place, listing, name, files[name]) for name in shards)), None)


def _broken_config(content: bytes | None) -> str | None:
    try:
        whole = content is None or isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        whole = False
    return None if whole else f"has an {_CONFIG} that is no JSON object"


def _cut(place: Location, listing: Listing, name: str, num_bytes: int) -> str | None:
    """Return what is wrong with the size of a safetensors file by its own header.

    The format: eight bytes with the length of a JSON header, that header, then the bytes of all tensors, without gaps.
    """
    start = listing.start(place, name, _START_BYTES)
    if start is None:
        return None
    num_header = int.from_bytes(start[:8], "little")
    if len(start) < 8 or 8 + num_header > num_bytes or num_header > _MAX_HEADER_BYTES:
        return f"has {num_bytes} bytes of {name}, and no whole header in them"
    if len(start) < 8 + num_header:
        start = listing.start(place, name, 8 + num_header) or b""
    try:
        header = json.loads(start[8 : 8 + num_header])
        ends = [entry["data_offsets"][1] for tensor, entry in header.items() if tensor != "__metadata__"]
        expected = 8 + num_header + max(ends, default=0)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError):
        return f"has {num_bytes} bytes of {name}, and no whole header in them"
    return None if expected == num_bytes else f"has {num_bytes} bytes of {name}, whose header speaks of {expected}"
