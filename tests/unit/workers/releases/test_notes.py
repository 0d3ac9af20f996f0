"""Notes on what an adapter says it was trained on, against what it is merged into."""

import json
from pathlib import Path

import pytest

from jobs.locations import LocalPath
from jobs.request import MergeRequest
from workers.releases.base_card import BaseCard
from workers.releases.notes import find_notes
from workers.releases.shipment import Shipment
from workers.sources.fetch import Source

UNSLOTH = "unsloth/llama-3-8b-Instruct-bnb-4bit"
DOUBLE = {"bnb_4bit_use_double_quant": True}


def notes(tmp_path, trained_on, *, stored=False, base="/bases/llama", card=None, adapter_cards=(), **fields):
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": trained_on}))
    request = MergeRequest(base=base, adapter=str(directory), destination="/out", **fields)
    return find_notes(
        request,
        Source(location=LocalPath(Path(base)), directory=tmp_path, digest="0" * 64),
        (Source(location=LocalPath(directory), directory=directory, digest="0" * 64),),
        stored_in_form=stored,
        card=card or BaseCard(),
        adapter_cards=adapter_cards,
        shipment=Shipment(files={}, broken={}, from_adapter=frozenset(), of_base={}, trained_modules=(), left=()),
        num_rows=None,
    )


@pytest.mark.parametrize(
    ("trained_on", "fields", "phrases"),
    [
        (UNSLOTH, {"base_quantization": "none"}, ["base_quantization: nf4", "use_double_quant: true"]),
        (UNSLOTH, {"base_quantization": "nf4"}, ["use_double_quant: true"]),
        (UNSLOTH, {"base_quantization": "fp4", "quantization_options": DOUBLE}, ["holds nf4"]),
        ("/models/x-bnb-nf4/", {"base_quantization": "none"}, ["base_quantization: nf4"]),
        ("org/llama-nf4", {"base_quantization": "none"}, ["base_quantization: nf4"]),
        ("org/llama-fp4-bnb", {"base_quantization": "none"}, ["weights in 4 bits"]),
        (f"/c/hub/models--unsloth--x-bnb-4bit/snapshots/{'0' * 40}", {"base_quantization": "none"}, ["nf4"]),
        (r"C:\models\x-bnb-4bit", {"base_quantization": "none"}, ["weights in 4 bits"]),
        ("org/Llama-2-7B-GPTQ", {"base_quantization": "nf4"}, ["weights in GPTQ", "other 4-bit weights"]),
        ("org/llama-8bit", {"base_quantization": "none"}, ["weights in 8bit", "the base's own weights"]),
    ],
)
def test_a_name_that_speaks_against_the_merge_is_told(tmp_path, trained_on, fields, phrases):
    note = " ".join(notes(tmp_path, trained_on, **fields))
    assert trained_on.replace("\\", "\\\\")[:50] in note  # long ones are cut
    assert [phrase for phrase in phrases if phrase not in note] == []


@pytest.mark.parametrize(
    ("trained_on", "fields"),
    [
        (UNSLOTH, {"base_quantization": "nf4", "quantization_options": DOUBLE}),
        (UNSLOTH, {"base_quantization": "nf4", "stored": True}),
        ("meta-llama/Llama-3.1-8B", {"base_quantization": "none"}),
        ("meta-llama/Llama-3.1-8B", {"base_quantization": "nf4"}),
        ("org/Model-FP8", {"base_quantization": "none", "base": "/bases/Model-FP8"}),
        ("org/habit4bit", {"base_quantization": "none"}),
        (None, {"base_quantization": "none"}),
    ],
)
def test_one_that_agrees_says_nothing(tmp_path, trained_on, fields):
    assert notes(tmp_path, trained_on, **fields) == ()


def test_a_card_that_cannot_be_read_is_told(tmp_path):
    [note] = notes(tmp_path, None, card=BaseCard(is_readable=False))
    assert "README.md" in note


@pytest.mark.parametrize(
    ("base", "adapter", "told"),
    [
        ({"license": "apache-2.0"}, {"license": "cc-by-nc-4.0"}, "(apache-2.0, cc-by-nc-4.0)"),
        ({}, {"license": "mit"}, "(unknown, mit)"),
        ({"license": "other", "license_name": "Qwen Research"}, {"license": "MIT"}, "(qwen-research, mit)"),
        ({"license": "mit"}, {"license": "MIT"}, None),
        ({"license": "mit"}, {}, None),
        ({"license": "other", "license_name": "x"}, {"license": "other", "license_name": "x"}, None),
    ],
)
def test_licences_that_differ_are_told(tmp_path, base, adapter, told):
    found = notes(tmp_path, None, card=BaseCard(metadata=base), adapter_cards=(BaseCard(metadata=adapter),))
    assert [told in note for note in found] == ([True] if told else [])
