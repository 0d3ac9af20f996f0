"""Files as nobody should write them: structural and bytewise changes of headers, indexes, configurations, tokenizers,
and request files, drawn from a seed."""

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BOMB = "(([a-z_.0-9])+)+$!"
_LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
_MANY = 30_000


def _values(outside: Path) -> list[Any]:
    """Return what a field is replaced by; `outside` is a file that nothing may read."""
    numbers = [-1, 0, 1, 2, 3, 0.5, -0.0, 10**6, 10**12, 10**18, 2**63, 10**30, 10**99, 1e-308, 1e308]
    paths = ["../../outside/secret", str(outside), f"file://{outside}"]
    texts = ["", " ", "a", "nf4", "float16", "bfloat16", "\ud800", "\u202egnp.exe", "\x1b[2J", "[red]x[/red] :smile:"]
    long_texts = ["a\nb\0c", "x" * 100_000, BOMB, ".*", "(", "^(?=(a+))\\1+$", "{{ 7*7 }}", _LOOPS]
    lists = [[], [[]], [None], ["q_proj"], [BOMB], list(range(_MANY)), ["q_proj"] * _MANY]
    mappings: list[Any] = [{}, {"a": 1}, {"q_proj": 3}, {BOMB: 2}]
    return [None, True, False, float("nan"), float("inf"), *numbers, *paths, *texts, *long_texts, *lists, *mappings]


_NAMES = (
    *("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "rank_pattern", "alpha_pattern"),
    *("target_parameters", "modules_to_save", "trainable_token_indices", "r", "lora_alpha", "use_rslora", "use_dora"),
    *("bias", "peft_type", "fan_in_fan_out", "lora_bias", "auto_map", "quantization_config", "num_hidden_layers"),
    *("depth", "hidden_size", "vocab_size", "architectures", "model_type", "tie_word_embeddings", "rope_scaling"),
    *("max_position_embeddings", "dtype", "torch_dtype", "normalizer", "pre_tokenizer", "post_processor"),
    *("added_tokens", "chat_template", "eos_token", "weight_map", "metadata", "__metadata__", "base", "adapter"),
    *("destination", "matrix", "defaults", "parity", "labels"),
)
_ODD_NAMES = ("\ud800", "\u202e", "x" * 2000, "..", "[red]")


def mutate_json(value: Any, random_: random.Random, outside: Path) -> Any:
    """Return a JSON value with one to three changes anywhere in it."""
    for _ in range(random_.choice((1, 1, 1, 2, 3))):
        value = _change(value, random_, outside)
    return value


def _change(value: Any, random_: random.Random, outside: Path) -> Any:
    if not isinstance(value, dict | list) or not value or random_.random() < 0.02:
        return random_.choice(_values(outside))
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = random_.choice(keys)
    changed: Any = dict(value) if isinstance(value, dict) else list(value)
    if isinstance(value[key], dict | list) and value[key] and random_.random() < 0.7:
        changed[key] = _change(value[key], random_, outside)
        return changed
    if isinstance(changed, dict) and random_.random() < 0.3:
        _change_name(changed, key, random_, outside)
    else:
        changed[key] = _other(changed[key], changed[random_.choice(keys)], random_, outside)
    return changed


def _change_name(fields: dict[str, Any], name: str, random_: random.Random, outside: Path) -> None:
    match random_.randrange(3):
        case 0:
            del fields[name]
        case 1:
            fields[random_.choice(_NAMES)] = random_.choice(_values(outside))
        case _:
            fields[random_.choice((*_NAMES, *_ODD_NAMES, f"{name}.", name.upper()))] = fields.pop(name)


def _other(value: Any, neighbour: Any, random_: random.Random, outside: Path) -> Any:
    """Return a value in the place of another."""
    kind = random_.randrange(8)
    if kind == 0:
        return neighbour
    if kind == 1 and type(value) is int:
        return random_.choice((value + 1, value - 1, -value, value * 1000))
    if kind == 2:
        for _ in range(random_.choice((10, 100, 900))):
            value = [value]
        return value
    if kind == 3 and isinstance(value, str) and value:
        place = random_.randrange(len(value))
        return value[:place] + random_.choice("\ud800\u202e\x1b.*([a/\\0 é") + value[place + 1 :]
    return random_.choice(_values(outside))


def as_text(value: Any, random_: random.Random) -> bytes:
    """Return JSON as bytes; in one of eight with a further change that no writer of JSON makes."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(50_000)  # some values are deeper than a stack that is in use already has room for
    try:
        data = json.dumps(value).encode()
    finally:
        sys.setrecursionlimit(limit)
    kind = random_.randrange(40)
    if kind == 0:
        return data.replace(b"1", b"9" * random_.choice((100, 4000, 5000, 100_000)), 1)
    if kind == 1:
        return b"[" * random_.choice((100, 10_000, 1_000_000)) + data
    if kind == 2:
        marked = b"\xef\xbb\xbf" + data
        return random_.choice((marked, data.decode().encode("utf-16"), data + b"\0", b"", b"\xff" + data))
    if kind == 3 and data[:1] == b"{" and len(data) > 2:
        return data[:-1] + b"," + data[1:]  # every field twice
    if kind == 4:
        return mutate_bytes(data, random_)
    return data


def mutate_bytes(data: bytes, random_: random.Random) -> bytes:
    """Return bytes cut off, flipped, doubled or filled somewhere."""
    if not data:
        return b"\0"
    place = random_.randrange(len(data))
    kind = random_.randrange(5)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + bytes([data[place] ^ (1 << random_.randrange(8))]) + data[place + 1 :]
    if kind == 2:
        return data[:place] + data[place : place + 64] * random_.randrange(2, 50) + data[place:]
    if kind == 3:
        return data[:place] + random_.randbytes(random_.randrange(1, 64)) + data[place:]
    return data[:place] + data[place + random_.randrange(1, 64) :]


def mutate_header(path: Path, random_: random.Random, outside: Path) -> None:
    """Change the header of a safetensors file, or the file as a whole."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    kind = random_.randrange(12)
    if kind == 0:
        path.write_bytes(mutate_bytes(data, random_))
        return
    if kind == 1:  # another order and more room: the same tensors
        names = list(header)
        random_.shuffle(names)
        raw = json.dumps({name: header[name] for name in names}, indent=random_.choice((None, 1))).encode()
        raw += b" " * (-len(raw) % 8)
    elif kind == 2:  # many more tensors, of no elements
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        raw = json.dumps(header | {f"extra.{n}": empty for n in range(random_.choice((1, 1000, 250_000)))}).encode()
    elif kind == 3:  # other names for the same bytes
        names = [name for name in header if name != "__metadata__"]
        a, b = random_.choice(names), random_.choice(names)
        header[a], header[b] = header[b], header[a]
        raw = json.dumps(header).encode()
    else:
        raw = as_text(mutate_json(header, random_, outside), random_)
    length = len(raw)
    if random_.random() < 0.05:
        length = random_.choice((0, length + 1, length - 1, 90_000_000, 1 << 40, 1 << 63))
    if kind == 4:
        body = mutate_bytes(body, random_)
    path.write_bytes(length.to_bytes(8, "little", signed=False) + raw + body)


def replace_file(path: Path, random_: random.Random, outside: Path) -> None:
    """Put something that is no plain file in the place of a file."""
    path.unlink()
    kind = random_.randrange(6)
    makers: list[Callable[[], Any]] = [
        lambda: path.symlink_to(outside),
        lambda: path.symlink_to("../" * 12 + str(outside).lstrip("/")),
        lambda: path.symlink_to(path.name),
        lambda: os.mkfifo(path),
        path.mkdir,
        lambda: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC), 1 << 40),
    ]
    makers[kind]()
