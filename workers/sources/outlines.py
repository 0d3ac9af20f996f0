"""A checkpoint without its weights: small files whole, of each shard the header, and nothing where its data would be.

A shard of an outline has the size of the shard, as a file with a hole: what reads headers and checks them against the
file finds it as it is at its place. An outline of 700 GB takes some MB to bring and to keep.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jobs.errors import BadInputError
from jobs.locations import LocalPath, Location
from jobs.release import is_plain_path
from workers.files.checkpoint import MAX_HEADER_BYTES
from workers.files.gguf_front import MAX_FRONT_BYTES, SUFFIX, front_of
from workers.files.local import file_errors
from workers.sources.belongings import belongs, is_legal, is_template
from workers.sources.contents import Contents, open_contents

_FIRST_BYTES = 128 << 10
"""Of a shard, asked for at once: most headers are shorter."""
_MAX_FILES = 20_000
_MAX_FILE_BYTES = 128 << 20
"""As of a tokenizer (docs/bounds.md)."""
_MAX_BYTES = 1 << 30
"""Of all that is brought."""
_NUM_STREAMS = 8


def bring_outline(location: Location, directory: Path) -> Path:
    """Bring what of a checkpoint says what its weights are.

    Args:
        location: a directory, prefix or repository; a directory is taken as it lies there.
        directory: existing and empty; gets what is elsewhere.

    Returns:
        Where the outline is.

    Raises:
        NotFoundError: there is no such place.
        BadInputError: it holds far more files than a checkpoint has, or larger ones.
        AuthError, TransientIOError, NoCapacityError: by kind of fault.
    """
    if isinstance(location, LocalPath):
        return location.path
    contents = open_contents(location, directory)
    sizes = {name: size for name, size in contents.sizes.items() if is_plain_path(name) and _is_of_outline(name)}
    _check(location, sizes)
    outline = directory / "outline"
    with file_errors(f"making {outline}", outline):
        outline.mkdir()
        for name in sizes:
            (outline / name).parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_NUM_STREAMS, thread_name_prefix="outline") as pool:
        list(pool.map(lambda name: _bring(contents, name, sizes[name], outline / name), sizes))
    return outline


def _is_of_outline(name: str) -> bool:
    """Whether a file is at the top, or one of the few in folders that its configurations may name."""
    return "/" not in name or is_template(name) or name.endswith(".py")


def _is_read(name: str) -> bool:
    return name.endswith(".py") or is_template(name) or (belongs(name) and not is_legal(name))


def _check(location: Location, sizes: Mapping[str, int]) -> None:
    if len(sizes) > _MAX_FILES:
        raise BadInputError(f"{location}: expected at most {_MAX_FILES} files of a checkpoint, found {len(sizes)}")
    read = {name: size for name, size in sizes.items() if _is_read(name) and not name.endswith(".safetensors")}
    large = next((name for name, size in read.items() if size > _MAX_FILE_BYTES), None)
    if large is not None:
        raise BadInputError(
            f"{location}: {large}: expected a file of at most {_MAX_FILE_BYTES} bytes, found {read[large]}"
        )
    if (num_bytes := sum(read.values())) > _MAX_BYTES:
        raise BadInputError(f"{location}: expected at most {_MAX_BYTES} bytes beside the weights, found {num_bytes}")


def _bring(contents: Contents, name: str, num_bytes: int, path: Path) -> None:
    if name.endswith(".safetensors"):
        data = _header(contents, name, num_bytes)
    elif name.endswith(SUFFIX):
        data = _front(contents, name, num_bytes)
    elif _is_read(name):
        data = b"".join(contents.read(name))
    else:
        data = b""  # that it is there is all there is to know
    with file_errors(f"writing {path}", path), path.open("xb") as file:
        file.write(data)
        file.truncate(num_bytes)


def _front(contents: Contents, name: str, num_bytes: int) -> bytes:
    """Return the start of a GGUF file up to its tensors, which nothing at its beginning tells the length of.

    Where it says nonsense its reader tells; then it is less, or all that a front may have.
    """
    length = _FIRST_BYTES
    while True:
        data = contents.read_start(name, min(num_bytes, length)) if num_bytes else b""
        try:
            return data[: front_of(data, Path(name), num_bytes).num_bytes]
        except BadInputError:
            if length >= min(num_bytes, MAX_FRONT_BYTES) or not data.startswith(b"GGUF"):
                return data
        length = min(8 * length, MAX_FRONT_BYTES)


def _header(contents: Contents, name: str, num_bytes: int) -> bytes:
    """Return the start of a safetensors file up to its data; less where it says nonsense, which its reader tells."""
    data = contents.read_start(name, min(num_bytes, _FIRST_BYTES)) if num_bytes else b""
    length = 8 + int.from_bytes(data[:8], "little")
    if len(data) < length <= min(num_bytes, 8 + MAX_HEADER_BYTES):
        data = contents.read_start(name, length)
    return data[:length]
