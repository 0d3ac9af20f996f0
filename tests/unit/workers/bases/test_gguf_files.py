"""The front of a GGUF file: the vocabulary as llama.cpp reads it, how text is split, and reading under limits."""

import json
import struct

import pytest
import sentencepiece
import torch
from gguf import GGUFReader, SpecialVocab
from gguf.constants import GGMLQuantizationType, TokenType
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer

from examples import real_model
from jobs.errors import BadInputError, UnsupportedError
from tests.gguf_models import TEXTS, byte_level, pieces
from tests.models import build_tokenizer
from workers.bases.gguf_files.architectures import ARCHITECTURES
from workers.bases.gguf_files.architectures import fields_of as fields_of_config
from workers.bases.gguf_files.header import lay_out_file
from workers.bases.gguf_files.pre_tokenizers import pre_of, rows
from workers.bases.gguf_files.tensors import GgufTensor, ModelTensor, tensors_of
from workers.bases.gguf_files.vocabulary import read_vocabulary
from workers.bases.model import quiet_transformers
from workers.files.gguf_front import front_of, read_front

NUM_ROWS = 512
PRES = ("gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o")
IGNORING = ("llama-bpe", "tekken")
PLAIN_TEXTS = tuple(text for text in TEXTS if "<|" not in text)


def vocabulary_of(directory, num_rows=NUM_ROWS):
    contents = {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
    return read_vocabulary(directory, tuple(sorted(contents.items())), num_rows)


def file_of(directory, vocabulary):
    """Write a file with a vocabulary and next to nothing else."""
    tensor = GgufTensor(name="token_embd.weight", sources=("w",), shape=(NUM_ROWS, 32), kind=GGMLQuantizationType.F16)
    layout = lay_out_file("llama", (("add_block_count", 0),), vocabulary, (tensor,))
    path = directory / layout.name
    path.write_bytes(layout.header + bytes(layout.num_bytes - len(layout.header)))
    return path


def fields_of(path):
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


@pytest.mark.parametrize("pre", PRES)
def test_a_splitting_is_known_by_its_structure_and_makes_the_same_ids(tmp_path, pre):
    """Read back by transformers, which makes a tokenizer of the name."""
    directory = byte_level(tmp_path / "tokenizer", pre, ignore_merges=pre in IGNORING)
    document = json.loads((directory / "tokenizer.json").read_text())
    assert pre_of(document) == pre
    vocabulary = vocabulary_of(directory)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", pre)
    if pre == "smollm":
        return  # transformers 5.23 does not know it
    architecture, found, _ = get_gguf_tokenizer(str(file_of(tmp_path, vocabulary)))
    read_back, _ = convert_gguf_tokenizer(architecture, found)
    read_back.model.ignore_merges = pre in IGNORING  # which llama.cpp knows by the name, and transformers does not
    beside = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in TEXTS:
        assert read_back.encode(text).ids == beside.encode(text).ids, text


def test_a_merge_that_is_ignored_is_another_splitting(tmp_path):
    """Llama 3 takes a whole token where there is one; the same pattern without that has another name."""
    whole = json.loads((byte_level(tmp_path / "a", "llama-bpe", ignore_merges=True) / "tokenizer.json").read_text())
    merged = json.loads((byte_level(tmp_path / "b", "llama-bpe") / "tokenizer.json").read_text())
    assert (pre_of(whole), pre_of(merged)) == ("llama-bpe", "dbrx")


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}},
    ],
)
def test_what_is_in_no_row_is_not_guessed(tmp_path, change):
    directory = build_tokenizer(tmp_path / "tokenizer")
    document = json.loads((directory / "tokenizer.json").read_text()) | change
    assert pre_of(document) is None
    (directory / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UnsupportedError, match="expected a pre_tokenizer"):
        vocabulary_of(directory)


def test_every_row_says_where_it_is_from():
    for row in rows():
        assert "src/llama-vocab.cpp" in row.source
    assert {row.pre for row in rows()} == set(PRES)


@pytest.mark.parametrize("make", [build_tokenizer, lambda it: byte_level(it, "gpt-2", adds=True), pieces])
def test_special_tokens_are_those_of_the_gguf_package(tmp_path, make):
    """Its own reader of the same folder: ids, merges, template; and what it says of tokens that are added."""
    directory = make(tmp_path / "tokenizer")
    (directory / "config.json").write_text(json.dumps({"eos_token_id": [1, 2], "sep_token_id": 5}))
    vocabulary = vocabulary_of(directory)
    expected = SpecialVocab(directory, load_merges=vocabulary.model == "gpt2", n_vocab=NUM_ROWS)
    assert dict(vocabulary.special.ids) == expected.special_token_ids
    assert vocabulary.special.templates["default"] == expected.chat_template
    assert list(vocabulary.merges or ()) == expected.merges
    assert dict(vocabulary.special.adds) == {"bos": False, "eos": False} | expected.add_special_token


def test_a_text_that_begins_with_another_token_is_refused(tmp_path):
    directory = byte_level(tmp_path / "tokenizer", "gpt-2", adds=True)
    document = json.loads((directory / "tokenizer.json").read_text())
    document["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<|end|>", "type_id": 0}})
    (directory / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UnsupportedError, match="bos token"):
        vocabulary_of(directory)


def test_each_token_has_its_kind_and_rows_without_one_a_name_of_their_own(tmp_path):
    """As llama.cpp's converter has them: control, user-defined, normal; `[PAD]` up to the rows of the embedding."""
    directory = build_tokenizer(tmp_path / "tokenizer")
    document = json.loads((directory / "tokenizer.json").read_text())
    more = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    document["added_tokens"] += [
        {"id": 400, "content": "<think>", **more},
        {"id": 401, "content": "<|fim|>", **more},
    ]
    (directory / "tokenizer.json").write_text(json.dumps(document))
    found = vocabulary_of(directory)
    kinds = dict(zip(found.tokens, found.types, strict=True))
    assert len(found.tokens) == NUM_ROWS
    assert kinds["<|begin|>"] == kinds["<|fim|>"] == TokenType.CONTROL
    assert kinds["<think>"] == TokenType.USER_DEFINED
    assert kinds["a"] == TokenType.NORMAL
    assert kinds["[PAD511]"] == TokenType.UNUSED
    with pytest.raises(BadInputError, match="300 rows"):
        vocabulary_of(directory, 300)


KINDS = {"legacy": {"legacy": True}, "first": {"scheme": "first"}, "never": {"scheme": "never"}}


@pytest.mark.parametrize("of", KINDS)
def test_pieces_are_merged_by_score_as_sentencepiece_does(tmp_path, of):
    """Its own BPE, by the scores in the file: the algorithm of llama.cpp's `llama` vocabularies."""
    directory = pieces(tmp_path / "tokenizer", **KINDS[of])
    fields = fields_of(file_of(tmp_path, vocabulary_of(directory)))
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] == (of != "never")
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_piece, model.trainer_spec.unk_id = "<unk>", 0
    model.trainer_spec.bos_id = model.trainer_spec.eos_id = model.trainer_spec.pad_id = -1
    model.normalizer_spec.add_dummy_prefix = fields["tokenizer.ggml.add_space_prefix"]
    model.normalizer_spec.remove_extra_whitespaces = False
    named = {1: "NORMAL", 2: "UNKNOWN", 3: "CONTROL", 5: "UNUSED", 6: "BYTE"}
    for token, score, kind in zip(
        *(fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")), strict=True
    ):
        piece = model.pieces.add(piece=token, score=score)
        piece.type = getattr(piece, named[kind])
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    beside = Tokenizer.from_file(str(directory / "tokenizer.json"))
    num_asked = 0
    for text in PLAIN_TEXTS:
        if not text or (of == "first" and text.startswith(" ")):
            continue  # Metaspace puts no second space in front, llama.cpp and sentencepiece do
        assert processor.encode(text) == beside.encode(text).ids, text
        num_asked += 1
    assert num_asked > 6


def test_merges_of_one_piece_that_lie_apart_are_refused(tmp_path):
    directory = pieces(tmp_path / "tokenizer")
    document = json.loads((directory / "tokenizer.json").read_text())
    merges = document["model"]["merges"]
    merges.append(merges[0])
    (directory / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UnsupportedError, match="lie apart"):
        vocabulary_of(directory)


def test_templates_by_name_are_listed_in_order(tmp_path):
    directory = build_tokenizer(tmp_path / "tokenizer")
    (directory / "additional_chat_templates").mkdir()
    for name in ("tool_use", "rag", "zeta"):
        (directory / "additional_chat_templates" / f"{name}.jinja").write_text(f"{{# {name} #}}")
    fields = fields_of(file_of(tmp_path, vocabulary_of(directory)))
    assert fields["tokenizer.chat_templates"] == ["rag", "tool_use", "zeta"]
    assert fields["tokenizer.chat_template.rag"] == "{# rag #}"
    assert fields["tokenizer.chat_template"] == (directory / "chat_template.jinja").read_text()


def test_a_front_is_read_as_the_gguf_package_reads_it(tmp_path):
    path = file_of(tmp_path, vocabulary_of(build_tokenizer(tmp_path / "tokenizer")))
    front, reader = read_front(path), GGUFReader(path)
    assert front.num_bytes == reader.data_offset
    assert [(each.name, each.shape) for each in front.tensors] == [
        (each.name, tuple(reversed(each.shape.tolist()))) for each in reader.tensors
    ]
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            found, expected = front.fields[name], field.contents()
            assert getattr(found, "length", found) == (len(expected) if isinstance(expected, list) else expected)


@pytest.mark.parametrize("at", [0, 3, 4, 20, 60, 300, 5000])
def test_a_front_that_is_cut_short_is_told(tmp_path, at):
    data = file_of(tmp_path, vocabulary_of(build_tokenizer(tmp_path / "tokenizer"))).read_bytes()
    with pytest.raises(BadInputError, match=r"model\.gguf"):
        front_of(data[:at], tmp_path / "model.gguf", at)


def _text(text):
    return struct.pack("<Q", len(text)) + text


NONSENSE = {
    "no magic": (b"GGML" + bytes(20), "begins with"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version"),
    "too many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), "at most"),
    "a list without end": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 60),
        "at most",
    ),
    "a text without end": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 62), "at most"),
    "a field twice": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (_text(b"a") + struct.pack("<II", 4, 7)),
        "twice",
    ),
    "a list of lists": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _text(b"a") + struct.pack("<IIQ", 9, 9, 1),
        "numbers or strings",
    ),
    "no alignment": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _text(b"general.alignment") + struct.pack("<II", 4, 3),
        "power of two",
    ),
    "five dimensions": (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + _text(b"w") + struct.pack("<I", 5), "dimensions"),
    "no text": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _text(b"\xff\xfe"), "UTF-8"),
}


@pytest.mark.parametrize("of", NONSENSE)
def test_nonsense_is_told_and_takes_no_memory(tmp_path, of):
    data, words = NONSENSE[of]
    with pytest.raises(BadInputError, match=words):
        front_of(data, tmp_path / "model.gguf", len(data))


@pytest.mark.slow
def test_a_real_file_of_llama_cpps_converter_says_the_same(tmp_path):
    """SmolLM2 as it is packaged: names, shapes, hyperparameters, tokens, their kinds, merges, special ids, template."""
    source = real_model.gguf_path()
    with quiet_transformers():
        config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(tmp_path / "tokenizer")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    document = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    # transformers 5.23 does not know how `smollm` splits text; the model's own file says it so.
    digits = {"type": "Digits", "individual_digits": True}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, document["pre_tokenizer"]]}
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(document))
    row = ARCHITECTURES["LlamaForCausalLM"]
    stored = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    found = [
        ModelTensor(stored=name, name=name, shape=tuple(tensor.shape), dtype=torch.bfloat16)
        for name, tensor in stored.items()
    ]
    tensors = tensors_of(source, row, config, found, GGMLQuantizationType.Q8_0)
    num_rows = config.vocab_size
    vocabulary = vocabulary_of(tmp_path / "tokenizer", num_rows)
    layout = lay_out_file("llama", fields_of_config(row, config, num_rows), vocabulary, tensors)
    with (tmp_path / layout.name).open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.num_bytes)
    ours, theirs = GGUFReader(tmp_path / layout.name), GGUFReader(source)
    shapes = [{each.name: tuple(each.shape.tolist()) for each in reader.tensors} for reader in (ours, theirs)]
    assert shapes[0] == shapes[1]
    said = [{name: field.contents() for name, field in reader.fields.items()} for reader in (ours, theirs)]
    alike = said[0].keys() & said[1].keys() - {"general.file_type", "GGUF.kv_count"}
    assert {name for name in alike if said[0][name] != said[1][name]} == set()
    only_theirs = {name for name in said[1].keys() - said[0].keys() if not name.startswith("general.")}
    assert only_theirs == {"tokenizer.ggml.add_space_prefix"}  # of a byte-level vocabulary it says nothing
    assert said[0]["tokenizer.ggml.pre"] == "smollm"
