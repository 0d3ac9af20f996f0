"""What transformers knows of a base before any weight is read: its modules, and which ones 4-bit loading converts."""

import contextlib
import inspect
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.initialization import no_tie_weights
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging as transformers_logging

from jobs.errors import BadInputError, NotFoundError, UnsupportedError
from jobs.request import BaseQuantization, QuantizationOptions
from workers.bases.forms.declared import declared
from workers.files.checkpoint import read_json

_REFUSALS = (
    ArithmeticError,
    AssertionError,  # torch, of a padding token beyond the embedding
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What transformers raises on a configuration with a wrong value in it, depending on where it stumbles."""

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""What weights are merged in, by the words of a request and of `config.json`."""
_DEPTHS = frozenset({"num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"})
"""What architectures call the number of their layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredQuantization:
    """The 4-bit format a base is stored in on disk."""

    quantization: BaseQuantization
    options: QuantizationOptions


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and notices off the terminal; errors still arrive as exceptions."""
    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def bitsandbytes_config(quantization: BaseQuantization, options: QuantizationOptions) -> BitsAndBytesConfig:
    """Return the configuration with which transformers would load the base in 4-bit."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.value,
        bnb_4bit_use_double_quant=options.bnb_4bit_use_double_quant,
        llm_int8_skip_modules=None if options.llm_int8_skip_modules is None else list(options.llm_int8_skip_modules),
    )


def stored_quantization(directory: Path) -> StoredQuantization | None:
    """Return the 4-bit format a base is stored in, or None for one in plain weights, or in another form.

    Raises:
        UnsupportedError: the base is stored in a form that is not merged; the message says what to do.
        BadInputError: the configuration contradicts itself or is none.
    """
    found = declared(directory)
    if found is None or not found.in_4bit:
        return None
    stored = found.content
    quant_type = stored.get("bnb_4bit_quant_type", "fp4")
    skip = stored.get("llm_int8_skip_modules")
    if quant_type not in ("nf4", "fp4"):
        raise BadInputError(
            f"{directory / 'config.json'}: quantization_config.bnb_4bit_quant_type: expected nf4 or fp4, found "
            f"{quant_type!r}"
        )
    if skip is not None and not (isinstance(skip, list) and all(isinstance(name, str) for name in skip)):
        raise BadInputError(
            f"{directory / 'config.json'}: quantization_config.llm_int8_skip_modules: expected a list of names, found "
            f"{skip!r}"
        )
    return StoredQuantization(
        quantization=BaseQuantization(quant_type),
        options=QuantizationOptions(
            bnb_4bit_use_double_quant=bool(stored.get("bnb_4bit_use_double_quant", False)),
            llm_int8_skip_modules=None if skip is None else tuple(skip),
        ),
    )


def config_dtype(directory: Path) -> torch.dtype:
    """Return what the weights of a base in a stored form are dequantized to: the dtype that its configuration states.

    What `dequantize()` of transformers casts the weights of a 4-bit checkpoint to.
    """
    config = read_json(directory / "config.json")
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if not isinstance(name, str) or name not in TORCH_DTYPES:
        raise UnsupportedError(f"{directory / 'config.json'}: dtype {name!r}; expected {list(TORCH_DTYPES)}")
    return TORCH_DTYPES[name]


def load_config(directory: Path) -> Any:
    """Read a base's configuration through transformers, without running code that comes with it.

    Raises:
        NotFoundError: no `config.json`.
        UnsupportedError: the model needs code of its own, or this transformers does not know it or its values.
    """
    if not (directory / "config.json").is_file():
        raise NotFoundError(f"{directory / 'config.json'}: expected a model configuration, found nothing")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except _REFUSALS as error:
        raise UnsupportedError(
            f"{directory / 'config.json'}: transformers {transformers.__version__} cannot read it, and code that comes "
            f"with a model is never run: {error}"
        ) from error
    if not isinstance(config.model_type, str):  # where transformers guesses by the name of the directory
        raise UnsupportedError(
            f"{directory / 'config.json'}: transformers {transformers.__version__} cannot go by it: model_type: "
            f"expected a name, found {config.model_type!r}"
        )
    return config


def check_depth(directory: Path, num_tensors: int) -> None:
    """Check that a configuration asks for no more layers than a checkpoint can fill: building them would take forever.

    Raises:
        BadInputError: it has more layers than the checkpoint has tensors.
    """
    path = directory / "config.json"
    sections = [_read_config(directory)]
    while sections:
        for field, value in sections.pop().items():
            if isinstance(value, dict):
                sections.append(value)
            elif field in _DEPTHS and isinstance(value, int) and not 0 <= value <= num_tensors:
                raise BadInputError(
                    f"{path}: {field}: expected 0 to {num_tensors}, the tensors of the checkpoint, found {value}; "
                    "weights and configuration are not of the same model"
                )


def model_class(config: Any) -> Any:
    """Return the class of transformers that a checkpoint is loaded with: the one that saved it.

    A configuration that names none, or one that is not transformers' own, stands for a causal language model.
    """
    names = getattr(config, "architectures", None)
    for name in names if isinstance(names, list) else ():
        named = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(named, type) and issubclass(named, PreTrainedModel):
            return named
    return AutoModelForCausalLM


def skeleton(directory: Path, *, tied: bool = True) -> PreTrainedModel:
    """Build the base's model on the meta device: every module and name, no weights.

    Args:
        directory: of the base.
        tied: whether tied weights are one parameter already; while `from_pretrained` loads, they are not.

    Raises:
        UnsupportedError: transformers builds no model from this configuration.
    """
    config = load_config(directory)
    # A stored 4-bit format would make transformers quantize; names and shapes are those of the plain model.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind = model_class(config)
    try:
        ties = contextlib.nullcontext() if tied else no_tie_weights()
        with torch.device("meta"), quiet_transformers(), ties:
            model = kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)  # noqa: SLF001
    except _REFUSALS as error:
        raise UnsupportedError(
            f"{directory / 'config.json'}: transformers {transformers.__version__} builds no {kind.__name__} of "
            f"model_type {getattr(config, 'model_type', None)!r} from it: {type(error).__name__}: {error}"
        ) from error
    assert isinstance(model, PreTrainedModel)
    return model


def answers_prompts(model: PreTrainedModel) -> bool:
    """Return whether a model continues text, given nothing but its tokens."""
    parameters = inspect.signature(model.forward).parameters
    return bool(model.can_generate()) and not model.config.is_encoder_decoder and "input_ids" in parameters


def input_embedding(model: PreTrainedModel) -> torch.nn.Module | None:
    """Return the module that looks up the inputs of a model; None for models of images or sound, which have none."""
    try:
        found: torch.nn.Module | None = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return found


def token_embedding(model: PreTrainedModel) -> tuple[str | None, int]:
    """Return the name of the weight whose rows are a model's tokens, and how many further rows stand beside it.

    The name is None for a model without tokens. Rows beside are those of Idefics, for tokens that were added.
    """
    embedding = input_embedding(model)
    name = next((name for name, module in model.named_modules() if module is embedding), None)
    if name is None or not isinstance(embedding, torch.nn.Embedding):
        return None, 0
    return f"{name}.weight", int(getattr(embedding, "num_additional_embeddings", 0) or 0)


def ignores_missing(model: PreTrainedModel, name: str) -> bool:
    """Return whether transformers makes a tensor by itself, so that checkpoints need not hold it."""
    patterns: Any = model._keys_to_ignore_on_load_missing or ()  # noqa: SLF001
    return any(re.search(pattern, name) for pattern in patterns)


def quantized_weights(
    model: PreTrainedModel, quantization: BaseQuantization, options: QuantizationOptions
) -> list[str]:
    """Ask transformers which weights 4-bit loading converts.

    Args:
        model: skeleton, not tied; its linear modules are replaced, so it is of no further use.
        quantization: nf4 or fp4.
        options: double quantization and skip list.

    Returns:
        Names such as `model.layers.0.self_attn.q_proj.weight`, in module order.
    """
    quantizer = AutoHfQuantizer.from_config(bitsandbytes_config(quantization, options), pre_quantized=False)
    with quiet_transformers():
        quantizer.preprocess_model(model=model, device_map=None)
    return [f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]


def _read_config(directory: Path) -> dict[str, Any]:
    config = read_json(directory / "config.json")
    if not isinstance(config, dict):
        raise BadInputError(f"{directory / 'config.json'}: expected a JSON object, found {type(config).__name__}")
    return config
