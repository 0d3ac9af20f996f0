"""Checkpoints loaded to run: by plain transformers in float32, placed where they fit."""

import contextlib
import copy
import functools
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, GenerationConfig, GgufConfig, PreTrainedModel

from jobs.errors import NoCapacityError
from workers.bases.forms.declared import declared_form
from workers.bases.four_bit import of_state
from workers.bases.gguf_files.architectures import config_to_load
from workers.bases.model import config_dtype, load_config, model_class, stored_quantization
from workers.files.gguf_front import SUFFIX, read_front
from workers.files.memory import available_host_bytes, hold_little
from workers.parity.inference import RunningModel, quiet_libraries

_USABLE = 0.9
"""Share of free memory that weights may take; the rest is for activations, and for what others do meanwhile."""
_NUM_NAMED = 5
"""Tensors named in a message that could name thousands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Where models may run, and the memory their weights may take there."""

    device: torch.device
    scratch: Path
    """A directory of the caller's, for weights that transformers has to write anew before it can offload them."""
    host_bytes: int | None = None
    """Main memory for weights; None means nine tenths of what is free when a model is loaded."""


def load_model(
    directory: Path, room: Room, quantization: BitsAndBytesConfig | None = None, *, dequantize: bool = False
) -> RunningModel:
    """Load a checkpoint to run in float32.

    Args:
        directory: a checkpoint in 16 or 32 bits, or one stored in a form that is read.
        room: where it may go. Weights that do not fit the device go to main memory, then stay in their files, and are
            fetched when they are needed; those of a stored form go to the device all together, or to main memory.
        quantization: how linear weights are converted to 4-bit while loading; None takes them as they are stored.
        dequantize: whether weights in 4-bit are turned back, so that any adapter fits on them.

    Raises:
        NoCapacityError: weights of a stored form fit neither the device nor main memory.
    """
    hold_little()
    if (file := _gguf_file(directory)) is not None:
        return _load_gguf(directory, file, room)
    form = declared_form(directory)
    in_4bit = quantization is not None or stored_quantization(directory) is not None
    how: dict[str, Any] = {"dtype": torch.float32}
    config = load_config(directory)
    if form is None and hasattr(config, "quantization_config"):
        del config.quantization_config  # of activations or the KV cache alone
    if quantization is not None:
        how |= {"quantization_config": quantization}
    elif form is not None and form.loaded_as is not None:
        config.quantization_config = dict(form.loaded_as)
        how = {"dtype": config_dtype(directory)}  # rounded as the merge rounds it
    for device, max_memory in _placements(room, in_form=in_4bit or form is not None):
        try:
            model, info = _from_files(directory, config, room, max_memory, how)
        except ValueError as error:
            if not (in_4bit or form) or "dispatched on the CPU or the disk" not in str(error):
                raise
        else:
            if dequantize and in_4bit:
                with quiet_libraries():
                    model = model.dequantize()
                # transformers 5.23 leaves it set, and some of PEFT's methods refuse such a model.
                model.is_loaded_in_4bit = False
            return _prepare(model, info, device=device)
    words = "4-bit" if in_4bit or form is None else form.words
    raise NoCapacityError(
        f"{directory}: in {words} it fits neither {room.device} nor main memory, and {words} weights cannot stay on "
        "disk; use a larger worker, or parity level: arithmetic"
    )


def _gguf_file(directory: Path) -> str | None:
    """Return the GGUF file of a release that is one; None for others."""
    names = sorted(path.name for path in directory.iterdir() if path.suffix in (SUFFIX, ".safetensors"))
    return names[0] if len(names) == 1 and names[0].endswith(SUFFIX) else None


def _load_gguf(directory: Path, file: str, room: Room) -> RunningModel:
    """Load the GGUF file of a release, by transformers, with the configuration beside it.

    The front of the file says less than `config.json`: nothing of scaled rotary frequencies, among others.

    Raises:
        NoCapacityError: it fits neither the device nor main memory: transformers leaves nothing of it on the disk.
    """
    config = config_to_load(directory / "config.json", load_config(directory))
    num_bytes = 4 * sum(math.prod(entry.shape) for entry in read_front(directory / file).tensors)
    how = {"dtype": torch.float32, "gguf_file": file, "quantization_config": GgufConfig(dequantize=True)}
    for device, max_memory in _placements(room, in_form=True):
        if sum(max_memory.values()) >= num_bytes:
            # Whatever it is told, transformers 5.23 draws a bar on stderr.
            with contextlib.redirect_stderr(io.StringIO()):
                model, info = _from_files(directory, config, room, max_memory, how)
            return _prepare(model, info, device=device)
    raise NoCapacityError(
        f"{directory / file}: in float32 it takes {num_bytes} bytes, more than there are, and weights of a GGUF file "
        "cannot stay on disk; use a larger worker, or parity level: arithmetic"
    )


def _from_files(
    directory: Path, config: Any, room: Room, max_memory: Mapping[int | str, int], how: Mapping[str, Any]
) -> tuple[Any, Any]:
    """Have transformers load a checkpoint; return the model, and what it says of the names."""
    with quiet_libraries():
        loaded: Any = model_class(config).from_pretrained(
            directory,
            config=copy.deepcopy(config),
            **how,
            device_map="sequential",
            max_memory=max_memory,
            offload_folder=room.scratch,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    model, info = loaded
    return model, info


def _placements(room: Room, *, in_form: bool) -> list[tuple[torch.device, dict[int | str, int]]]:
    host: dict[int | str, int] = {
        "cpu": room.host_bytes if room.host_bytes is not None else int(available_host_bytes() * _USABLE)
    }
    if room.device.type == "cpu":
        return [(room.device, host)]
    index = room.device.index or 0
    on_device: dict[int | str, int] = {index: int(torch.cuda.mem_get_info(index)[0] * _USABLE)}
    if in_form:
        return [(room.device, on_device), (torch.device("cpu"), host)]
    return [(room.device, on_device | host)]


def _prepare(model: PreTrainedModel, info: dict[str, Any], *, device: torch.device) -> RunningModel:
    for parameter in model.parameters():
        # Of a checkpoint stored in 4-bit, transformers loads the other weights in their own dtype, not in that given.
        # Codes may have a float dtype, too (`bnb_4bit_quant_storage`): those are bytes, not numbers.
        if parameter.dtype in (torch.bfloat16, torch.float16) and getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.float()
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # A bitsandbytes Linear4bit: its AVX512 kernel rounds inputs and scales to bfloat16, and a checkpoint may
            # ask for a 16-bit compute dtype.
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = torch.float32
            module.compute_type_is_set = True
            state = module.weight.quant_state
            if module.weight.device.type == "cpu" and state.shape[1] % state.blocksize:
                # Its other AVX512 kernel takes the wrong scales where blocks go on from one row to the next.
                module.forward = functools.partial(_forward_in_blocks, module)
    # PEFT would place a model with this attribute anew, and write to its files; the hooks are where they belong.
    model.__dict__.pop("hf_device_map", None)
    stop = model.generation_config.eos_token_id if model.generation_config is not None else None
    # Greedy search alone; penalties and sampling of the checkpoint's own generation_config.json do not count.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=stop, pad_token_id=0)
    return RunningModel(
        model=model.eval(),
        device=device,
        misfits=tuple(
            f"{kind.replace('_', ' ')}: {_some(info[kind])}"
            for kind in ("missing_keys", "mismatched_keys", "error_msgs")
            if info[kind]
        ),
        strangers=frozenset(map(str, info["unexpected_keys"])),
        stop_ids=frozenset(stop if isinstance(stop, list) else () if stop is None else (stop,)),
    )


def _forward_in_blocks(module: Any, x: torch.Tensor) -> torch.Tensor:
    weight = of_state(module.weight.data, module.weight.quant_state)
    return torch.nn.functional.linear(x, weight.dequantize_rows(0, weight.shape[0]).to(x.dtype), module.bias)


def _some(names: Sequence[object]) -> str:
    listed = sorted(map(str, names))
    more = f" and {len(listed) - _NUM_NAMED} more" if len(listed) > _NUM_NAMED else ""
    return ", ".join(listed[:_NUM_NAMED]) + more if listed else "none"
