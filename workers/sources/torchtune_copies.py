"""What torchtune keeps of an adapter beside the one that it exports to PEFT: the same tensors, by its own names."""

import hashlib
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from jobs.errors import BadInputError
from workers.files.layout import ShardLayout, TensorSpec
from workers.files.tensor_io import opened, read_into_bytes

_TORCHTUNE = re.compile(r".+\.(lora_[ab]\.weight|magnitude(\.weight)?)")
"""What torchtune itself calls the tensors of an adapter."""


def leave_out_copies(
    directory: Path, read: Sequence[tuple[str, Path, ShardLayout]], *, beside: Collection[str]
) -> tuple[list[tuple[str, Path, ShardLayout]], list[str]]:
    """Leave out torchtune's own copy of the adapter (adapter_model.pt) after a look that it holds nothing else.

    Args:
        directory: of the adapter.
        read: its files by name, each as a safetensors file with its layout.
        beside: names of those that are not its own.

    Returns:
        The other files, and the tensors of the copy whose rows stand in another order in the adapter.

    Raises:
        BadInputError: a copy holds something else.
    """
    copies = [each for each in read if each[0] in beside and _is_torchtunes(each[2])]
    owners = [each for each in read if each[0] not in beside] if copies else []
    fingerprints = [_fingerprint(path, spec) for _, path, shard in owners for spec in shard.tensors]
    own, in_order = {each[:3] for each in fingerprints}, set(fingerprints)
    reordered = []
    for name, path, shard in copies:
        for spec in shard.tensors:
            fingerprint = _fingerprint(path, spec)
            if fingerprint not in in_order:
                reordered.append(spec.name)
            if fingerprint[:3] not in own:
                raise BadInputError(
                    f"{directory}: {name} is an adapter as torchtune keeps it for itself, and {owners[0][0]} has "
                    f"nothing like its tensor {spec.name}; remove {name} if the other is the adapter to merge"
                )
    return [each for each in read if each not in copies], reordered


def _is_torchtunes(shard: ShardLayout) -> bool:
    return bool(shard.tensors) and all(_TORCHTUNE.fullmatch(spec.name) for spec in shard.tensors)


def _fingerprint(path: Path, spec: TensorSpec) -> tuple[str, tuple[int, ...], str, str]:
    """Return dtype, shape, and digests of the rows in any order and in their own.

    torchtune orders rows of queries and keys in another way (`tune_to_peft_adapter_weights` of torchtune 0.6).
    """
    with opened(path) as reading:
        data = read_into_bytes(reading, path, spec.num_bytes, spec.begin)
    rows = sorted(data[begin : begin + spec.row_bytes] for begin in range(0, len(data), max(1, spec.row_bytes)))
    in_any, in_their_own = (hashlib.sha256(each).hexdigest() for each in (b"".join(rows), data))
    return spec.code, spec.shape, in_any, in_their_own
