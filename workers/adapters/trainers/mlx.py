"""Adapters of MLX: `adapters.safetensors` and `adapter_config.json` as mlx_lm writes them.

Layout: `LoRALinear`, `LoRASwitchLinear` and `LoRAEmbedding` of mlx_lm/tuner/lora.py, `DoRALinear` of dora.py, and
`linear_to_lora_layers` and `load_adapters` of utils.py, mlx_lm 0.32. A linear computes x W' + scale (x A) B, with
A [I, R] and B [R, O]: PEFT's two factors are their transposes, and scale is the factor itself, not divided by the rank.
A stack of experts has A [E, R, I] and B [E, O, R]; before mlx_lm 0.28.3 A was [E R, I]. Names are those of mlx_lm's
modules, which are the ones of transformers for the architectures below, except that the experts of a layer are one
`switch_mlp`.
"""

import re
from collections.abc import Mapping
from typing import Any

from jobs.errors import BadInputError, UnsupportedError
from jobs.request_files.problems import show
from workers.adapters.names import PREFIX
from workers.adapters.trainers.layout import (
    Converted,
    Foreign,
    KnownBase,
    Piece,
    alpha_for,
    by_module,
    check_fields,
    halves,
    lora_config,
    misshapen,
    number_in,
    pair,
    rank_in,
    row_of,
    transposed,
)
from workers.files.layout import TensorSpec

WORDS = "an adapter of MLX"
_ENDS = {".lora_a": "a", ".lora_b": "b", ".m": "magnitude"}
_FUSE = "merge it with MLX itself (mlx_lm.fuse --dequantize)"
_CONSUMED = frozenset({"fine_tune_type", "lora_parameters", "num_layers", "lora_layers", "use_dora"})
_OF_TRAINING = frozenset(
    {
        *("adapter_file", "adapter_path", "batch_size", "clear_cache_threshold", "config", "data", "grad_checkpoint"),
        *("grad_accumulation_steps", "hf_dataset", "iters", "learning_rate", "lr_schedule", "mask_prompt"),
        *("max_seq_length", "model", "optimizer", "optimizer_config", "project_name", "prompt_feature", "report_to"),
        *("resume_adapter_file", "save_every", "seed", "steps_per_eval", "steps_per_report", "test", "test_batches"),
        *("text_feature", "completion_feature", "chat_feature", "train", "trust_remote_code", "val_batches", "wandb"),
    }
)
"""Arguments of mlx_lm.lora that say how it was trained, which it writes down with the rest."""
_OF_PARAMETERS = frozenset({"rank", "scale", "dropout", "keys", "alpha"})
SAME_NAMES = frozenset(
    {
        *("cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm4", "granite", "helium"),
        *("hunyuan_v1_dense", "llama", "mistral", "mixtral", "nemotron", "olmo2", "olmo3", "olmoe", "phi", "phi3"),
        *("phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2"),
    }
)
"""Architectures whose linears mlx_lm has under transformers' names and with transformers' values: what `sanitize` of
mlx_lm/models does for them is to stack experts and to leave out a head that is tied."""
_EXPERTS = {
    **dict.fromkeys(
        ("mixtral", "phimoe"),
        (".block_sparse_moe.", {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}),
    ),
    **dict.fromkeys(
        ("olmoe", "qwen2_moe", "qwen3_moe"),
        (".mlp.", {name: name for name in ("gate_proj", "down_proj", "up_proj")}),
    ),
}
"""Where experts stand in a layer, and what the files of a base call their linears, by what mlx_lm calls them."""

_LAYER = re.compile(r".*\blayers\.(\d+)\.(.+)")
_SINGLE = re.compile(r"\.experts\.\d+")
_STACKS = ("mlp.switch_mlp.", "block_sparse_moe.switch_mlp.")


def recognizes(config: Mapping[str, Any], names: frozenset[str]) -> bool:
    """Whether an adapter is one of MLX, by its configuration or by its names."""
    named = any(name.endswith((".lora_a", ".lora_b")) for name in names)
    return named or ("peft_type" not in config and ("fine_tune_type" in config or "lora_parameters" in config))


def convert(foreign: Foreign, base: KnownBase) -> Converted:
    """Give an adapter of MLX the layout of PEFT; raises as `convert_adapter`."""
    config = foreign.config
    parameters, use_dora = _parameters(foreign)
    check_fields(foreign, _CONSUMED | _OF_TRAINING, WORDS)
    if base.model_type not in SAME_NAMES:
        raise UnsupportedError(
            f"{foreign.file}: this is {WORDS} for a base of model_type {base.model_type}, whose modules mlx_lm has "
            f"under other names or with other values, or is not known to have as transformers has them; {_FUSE}"
        )
    rank = rank_in(foreign, "lora_parameters.rank", parameters.get("rank"))
    scale = _scale(foreign, parameters, rank)
    pieces: list[Piece] = []
    modules = []
    for module, parts in by_module(foreign, _ENDS, WORDS).items():
        for name, made in _module(foreign, base, module, parts, rank).items():
            modules.append(name)
            pieces += made
        if ("magnitude" in parts) != use_dora:
            raise BadInputError(
                f"{foreign.place}: module {module}: {'no magnitude' if use_dora else 'a magnitude'} is there, and "
                f"fine_tune_type of adapter_config.json says {'dora' if use_dora else 'lora'}; the configuration is "
                "not the adapter's own"
            )
    _check_places(foreign, base, parameters, modules)
    trained_on = config.get("model")
    on = f", trained on {trained_on}" if isinstance(trained_on, str) and trained_on else ""
    return Converted(
        words=f"{WORDS}{on}",
        config=lora_config(foreign, modules, rank, alpha_for(scale, rank), use_dora=use_dora),
        pieces=tuple(pieces),
    )


def _parameters(foreign: Foreign) -> tuple[Mapping[str, Any], bool]:
    """Return what the configuration says of LoRA, and whether it is DoRA."""
    config = foreign.config
    if "peft_type" in config:
        raise UnsupportedError(
            f"{foreign.file}: the tensors are those of MLX, and this is a configuration of "
            "PEFT, which does not say what MLX multiplies them by; put the adapter_config.json there that mlx_lm wrote"
        )
    kind = config.get("fine_tune_type", "dora" if config.get("use_dora") else "lora")
    if kind == "full":
        raise UnsupportedError(
            f"{foreign.file}: fine_tune_type 'full': the file holds whole layers, not an adapter; a "
            f"model that was trained whole needs no merge: {_FUSE}"
        )
    if kind not in ("lora", "dora"):
        raise UnsupportedError(f"{foreign.file}: fine_tune_type: expected lora or dora, found {show(kind)}")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise UnsupportedError(
            f"{foreign.file}: field lora_parameters: expected an object with rank and scale, as mlx_lm writes it, "
            f"found {show(parameters)}; without it nothing says what the deltas are multiplied by: write it by hand if "
            f"you know, or {_FUSE}"
        )
    for name in sorted(parameters.keys() - _OF_PARAMETERS):
        if name not in foreign.inert_fields:
            raise UnsupportedError(
                f"{foreign.file}: field lora_parameters.{name} = {show(parameters[name])} is none that is known of "
                f"{WORDS}, and may change the merge; take it out if it changes nothing"
            )
    return parameters, kind == "dora"


def _check_places(foreign: Foreign, base: KnownBase, parameters: Mapping[str, Any], modules: list[str]) -> None:
    """Check that modules are where the configuration says: under its keys, in the last so many layers."""
    keys = parameters.get("keys")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise BadInputError(f"{foreign.file}: field lora_parameters.keys: expected a list of names, found {show(keys)}")
    num_layers = foreign.config.get("num_layers", foreign.config.get("lora_layers", -1))
    if type(num_layers) is not int:
        raise BadInputError(f"{foreign.file}: field num_layers: expected a whole number, found {show(num_layers)}")
    first = base.number("num_hidden_layers") - num_layers if num_layers > 0 else 0
    for module in modules:
        layer = _LAYER.fullmatch(_SINGLE.sub(".switch_mlp", module))
        trained = module in (keys or ()) if layer is None else keys is None or layer[2] in keys or module in keys
        if layer is not None and layer[2].startswith(_STACKS):
            trained = keys is None or any(str(key).startswith(_STACKS) for key in keys)
        if not trained or (layer is not None and int(layer[1]) < first):
            raise BadInputError(
                f"{foreign.place}: module {module} was trained, and lora_parameters.keys and num_layers of "
                "adapter_config.json do not name it; the configuration is not the adapter's own"
            )


def _scale(foreign: Foreign, parameters: Mapping[str, Any], rank: int) -> float:
    """Return what deltas are multiplied by.

    mlx_lm multiplied by scale * alpha / rank until June 2024, wrote an alpha without a meaning until April 2025, and
    writes fine_tune_type since September 2024.
    """
    scale = number_in(foreign, "lora_parameters.scale", parameters.get("scale"))
    alpha = parameters.get("alpha")
    if alpha is None or "fine_tune_type" in foreign.config:
        return scale
    if number_in(foreign, "lora_parameters.alpha", alpha) != rank:
        raise UnsupportedError(
            f"{foreign.file}: field lora_parameters.alpha = {show(alpha)}: mlx_lm multiplied by scale * alpha / rank "
            "until June 2024 and by scale alone since, and nothing here says which version this is of; take alpha out "
            f"if it is of a later one, or else take it out and write scale = {scale * alpha / rank}"
        )
    return scale


def _module(
    foreign: Foreign, base: KnownBase, module: str, parts: Mapping[str, TensorSpec], rank: int
) -> dict[str, list[Piece]]:
    """Return the pieces that a module of MLX becomes, by PEFT's names of modules."""
    a, b = halves(foreign, module, parts)
    place, _, leaf = module.rpartition(".")
    if place.endswith(".switch_mlp"):
        return _experts(foreign, base, module, (a, b), rank)
    if a.shape[1:] != (rank,) or len(a.shape) != 2:
        raise misshapen(foreign, a, f"[inputs, {rank}]")
    if b.shape[:1] != (rank,) or len(b.shape) != 2:
        raise misshapen(foreign, b, f"[{rank}, outputs]")
    if leaf == "embed_tokens":
        return {module: _embedding(foreign, base, module, parts)}
    pieces = list(pair(module, transposed(a), transposed(b)))
    if (magnitude := parts.get("magnitude")) is not None:
        if magnitude.shape != b.shape[1:]:
            raise misshapen(foreign, magnitude, f"[{b.shape[1]}]")
        named = f"{PREFIX}{module}.lora_magnitude_vector"
        pieces.append(Piece(name=named, source=magnitude, shape=magnitude.shape))
    return {module: pieces}


def _embedding(foreign: Foreign, base: KnownBase, module: str, parts: Mapping[str, TensorSpec]) -> list[Piece]:
    """Return the pieces of an embedding, [V, H] + scale A B with A [V, R] and B [R, H]."""
    if "magnitude" in parts:
        raise UnsupportedError(
            f"{foreign.place}: tensor {parts['magnitude'].name}: DoRA on an embedding computes something else in "
            f"PEFT than in MLX; {_FUSE}"
        )
    if "lm_head.weight" not in base.names:
        raise UnsupportedError(
            f"{foreign.place}: tensor {parts['a'].name}: the head of this base is its embedding, and MLX adds the "
            f"delta to both, which PEFT does not; {_FUSE}"
        )
    a, b = transposed(parts["a"]), transposed(parts["b"])
    return [
        Piece(name=f"{PREFIX}{module}.lora_embedding_A", source=a.source, shape=a.shape, make=a.make),
        Piece(name=f"{PREFIX}{module}.lora_embedding_B", source=b.source, shape=b.shape, make=b.make),
    ]


def _experts(
    foreign: Foreign, base: KnownBase, module: str, factors: tuple[TensorSpec, TensorSpec], rank: int
) -> dict[str, list[Piece]]:
    """Return the pieces of a stack of experts, one pair for each."""
    a, b = factors
    place, leaf = module.rsplit(".switch_mlp.", 1)
    inside, names = _EXPERTS.get(base.model_type, ("", {}))
    start = f"{place}.experts."
    num_experts = base.num_experts(start, f".{names[leaf]}.weight") if leaf in names else 0
    if not num_experts or not f"{place}.".endswith(inside):
        raise UnsupportedError(
            f"{foreign.place}: tensor {a.name}: it is of a stack of experts, and the files of this base, of "
            f"model_type {base.model_type}, have no single ones where it was trained; {_FUSE}"
        )
    if len(b.shape) != 3 or b.shape[0] != num_experts or b.shape[2] != rank:
        raise misshapen(foreign, b, f"[{num_experts}, outputs, {rank}]")
    stacked = len(a.shape) == 3 and a.shape[:2] == (num_experts, rank)
    flat = len(a.shape) == 2 and a.shape[0] == num_experts * rank
    if not stacked and not flat:
        raise misshapen(foreign, a, f"[{num_experts}, {rank}, inputs]")
    if flat:
        a = _stack(a, num_experts)
    modules = [f"{start}{number}.{names[leaf]}" for number in range(num_experts)]
    return {each: list(pair(each, row_of(a, number), row_of(b, number))) for number, each in enumerate(modules)}


def _stack(spec: TensorSpec, count: int) -> TensorSpec:
    """Return a matrix [E R, I] as a stack [E, R, I]: the same bytes."""
    rows, columns = spec.shape
    return TensorSpec(name=spec.name, dtype=spec.dtype, shape=(count, rows // count, columns), begin=spec.begin)
