"""One parameter under two names: the release has what base + adapter computes, apart where that needs it."""

import contextlib
import itertools
import json

import pytest
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from tests import architectures
from tests.computed import computed_ends, is_rounded
from tests.merges import plan_pass, read_tensors
from tests.models import build_qwen2, load_plain, make_adapter
from tests.tied_heads import COLUMNS, tied_cells
from workers.merging.sidecars import write_sidecars

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _drop_base_layers(tensors):
    return {name: tensor for name, tensor in tensors.items() if "base_layer" not in name}


def _tie(tensors):
    """As after training on a base in float32, where PEFT keeps the matrices one."""
    embedding, head = "base_model.model.model.embed_tokens.lora_embedding_", "base_model.model.lm_head.lora_"
    halves = {f"{head}{half}.weight": tensors[embedding + other].T.contiguous() for half, other in ("AB", "BA")}
    return tensors | halves


ADAPTERS = {
    "head, with the base's": ({"targets": ["q_proj", "lm_head"]}, None),
    "head, without": ({"targets": ["q_proj", "lm_head"]}, _drop_base_layers),
    "embedding": ({"targets": ["q_proj", "embed_tokens"]}, None),
    "both": ({"targets": ["q_proj", "embed_tokens", "lm_head"]}, None),
    "DoRA on the head": ({"targets": ["lm_head"], "use_dora": True}, None),
    "DoRA on both": ({"targets": ["embed_tokens", "lm_head"], "use_dora": True}, None),
    "a trained embedding": ({"targets": ["q_proj"], "modules_to_save": ["embed_tokens"]}, None),
    "a trained head": ({"targets": ["q_proj"], "modules_to_save": ["lm_head"]}, None),
    "both trained, tied": (
        {"targets": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        None,
    ),
    "both, tied": ({"targets": ["embed_tokens"], "ensure_weight_tying": True}, _tie),
    "both, tied once": ({"targets": ["embed_tokens"], "ensure_weight_tying": True}, None),
    "tokens": ({"targets": ["q_proj"], "trainable_token_indices": [1, 5]}, None),
    "tokens of the head": ({"targets": ["q_proj"], "trainable_token_indices": {"lm_head": [1, 5]}}, None),
    "tokens of both": (
        {"targets": ["q_proj"], "trainable_token_indices": {"lm_head": [1, 5], "embed_tokens": [2, 3]}},
        None,
    ),
}
TIED = {"both trained, tied", "both, tied", "tokens"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """By what the configuration and the file say."""
    directory = tmp_path_factory.mktemp("tied")
    tied = build_qwen2(directory / "tied", tokenizer=False)
    apart = build_qwen2(directory / "apart", tokenizer=False, tie_word_embeddings=False)
    config = json.loads((apart / "config.json").read_text())
    (apart / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    twice = build_qwen2(directory / "twice", tokenizer=False)
    stored = load_file(twice / "model.safetensors")
    save_file(stored | {HEAD: stored[EMBEDDING].clone()}, twice / "model.safetensors", metadata={"format": "pt"})
    head_alone = build_qwen2(directory / "head alone", tokenizer=False)
    stored = load_file(head_alone / "model.safetensors")
    stored[HEAD] = stored.pop(EMBEDDING)
    save_file(stored, head_alone / "model.safetensors", metadata={"format": "pt"})
    return {"tied": tied, "apart": apart, "twice": twice, "head alone": head_alone}


@pytest.mark.parametrize(
    ("stored", "kind", "quantization"),
    [
        *itertools.product(["tied", "apart"], ADAPTERS, ["none"]),
        *itertools.product(["twice", "head alone"], ["head, with the base's", "embedding", "tokens"], ["none"]),
        *itertools.product(["tied", "apart"], ["head, with the base's", "both", "both trained, tied"], ["nf4"]),
    ],
)
def test_the_release_has_what_base_and_adapter_compute(bases, tmp_path, stored, kind, quantization):
    base = bases[stored]
    config, change = ADAPTERS[kind]
    adapter = make_adapter(base, tmp_path / "adapter", trained=True, **config)
    if change:
        path = adapter / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)
    planned = plan_pass(base, {"job": adapter}, tmp_path, base_quantization=quantization)
    result = planned.run(checked=True)
    assert not result.errors
    bad = [c.tensor for c in planned.check()["job"].values() if c.rounding_excess > 1 or c.num_bad_elements]
    assert not bad
    ends = computed_ends(
        base,
        adapter,
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if quantization == "nf4" else None,
    )
    write_sidecars(planned.plans[0], planned.output("job"))
    loaded = load_plain(planned.output("job"))
    before = load_plain(base)
    assert is_rounded(loaded.lm_head.weight, ends[HEAD], before.lm_head.weight)
    assert is_rounded(loaded.model.embed_tokens.weight, ends[EMBEDDING], before.model.embed_tokens.weight)
    tied = stored != "apart" and kind in TIED
    tensors = read_tensors(planned.output("job"))
    assert loaded.config.tie_word_embeddings == tied
    assert (tensors.keys() >= {HEAD, EMBEDDING}) == (not tied or stored == "twice")


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        ("encoder", "bert"),
        ("encoder-decoder", "t5"),
        pytest.param("decoder", "gemma3", marks=pytest.mark.slow),
    ],
)
def test_other_models_that_tie_more_or_otherwise(tmp_path, kind, model_type):
    base = architectures.build(kind, model_type, tmp_path / model_type)
    numbers = itertools.count()

    @contextlib.contextmanager
    def scratch():
        directory = tmp_path / str(next(numbers))
        directory.mkdir()
        yield directory

    cells = dict(tied_cells(base, scratch))
    assert cells.keys() == COLUMNS.keys()
    assert {column: why for column, (verdict, why) in cells.items() if verdict in ("wrong", "refused")} == {}
