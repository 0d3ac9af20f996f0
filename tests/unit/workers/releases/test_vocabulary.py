"""A tokenizer against its model, read as data: ids without rows, and tokens that generation does not stop at."""

import io
import json

import pytest
import sentencepiece
from transformers import AddedToken, AutoTokenizer

from jobs.errors import BadInputError
from tests.models import build_tokenizer
from tests.releases import write_files
from workers.bases.tokenizers import read_tokenizer
from workers.releases.vocabulary import rows_note, stop_notes

CHAT = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"


def files_of(directory):
    return {path.name: path for path in directory.iterdir()}


def tokenizer_with(directory, *, extra=(), special=(), template=None, **roles):
    """Save a tokenizer by transformers with tokens beyond those of `build_tokenizer`; return it as it is read here."""
    tokenizer = AutoTokenizer.from_pretrained(build_tokenizer(directory))
    tokenizer.add_tokens(list(extra))
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special], special_tokens=True)
    for role, token in roles.items():
        setattr(tokenizer, role, token)
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return tokenizer, read_tokenizer(files_of(directory))


def test_a_tokenizer_is_read_as_transformers_reads_it(tmp_path):
    real, read = tokenizer_with(tmp_path, extra=["<plain>"], special=["<|x|>"], template="{{ x }}", sep_token="<|x|>")
    assert read.ids == real.get_vocab()
    assert read.id_of("eos_token") == real.eos_token_id
    assert read.roles["sep_token"] == "<|x|>"
    assert {"<|x|>", "<|end|>", "<|begin|>"} <= read.special
    assert "<plain>" not in read.special
    assert read.templates == ("{{ x }}",)


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({"vocab.json": {"a": 0}, "added_tokens.json": {"b": 7}}, {"a": 0, "b": 7}),
        ({"tokenizer.json": {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}}, {"a": 0, "b": 1}),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"5": {"content": "x", "special": True}}}}, {"x": 5}),
        ({"vocab.json": ["a", "b"]}, {}),
        ({"tokenizer.json": {"model": {"vocab": {"a": "0", "b": 1}}, "added_tokens": [1, {"id": 2}]}}, {"b": 1}),
    ],
    ids=["slow", "unigram", "settings", "alphabet", "odd"],
)
def test_ids_of_other_files(tmp_path, files, ids):
    write_files(
        tmp_path, {"tokenizer_config.json": b"{}"} | {name: json.dumps(d).encode() for name, d in files.items()}
    )
    assert read_tokenizer(files_of(tmp_path)).ids == ids


def pieces_of(words):
    """Train sentencepiece on some words; return the model, and its pieces in order."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    read = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return model.getvalue(), [read.id_to_piece(id_) for id_ in range(read.vocab_size())]


def test_ids_of_files_whose_order_tells_them(tmp_path):
    model, pieces = pieces_of(["red green blue", "one two three"] * 50)
    for name, data, tokens in (
        ("spiece.model", model, pieces),
        ("vocab.txt", b"[PAD]\n[UNK]\na\n", ["[PAD]", "[UNK]", "a"]),
        ("qwen.tiktoken", b"IQ== 0\nIg== 1\n", ["IQ== 0", "Ig== 1"]),
    ):
        write_files(tmp_path / name, {name: data})
        read = read_tokenizer(files_of(tmp_path / name))
        assert read.counted == {token: id_ for id_, token in enumerate(tokens)}
        assert read.ids == {}
        assert list(rows_note(read, read, {}, len(tokens))) == []
        [note] = rows_note(read, read, {}, len(tokens) - 1)
        assert note.startswith(f"the tokenizer has 1 tokens with ids beyond the {len(tokens) - 1} rows")


@pytest.mark.parametrize("cut", [b"", b"\n", b"\n\xff", b"\n" + b"\xff" * 40, b"\n\x05\n\x7fabc", b"{}", b"\n\x00" * 9])
def test_a_file_that_is_no_sentencepiece_tells_nothing(tmp_path, cut):
    write_files(tmp_path, {"tokenizer.model": cut})
    assert read_tokenizer(files_of(tmp_path)).counted == {}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("name", "piece"), [("vocab.txt", b"a\n"), ("x.tiktoken", b"a 1\n"), ("x.model", b"\n\x02\n\x00")]
)
def test_a_file_with_more_tokens_than_any_has_is_refused(tmp_path, name, piece):
    write_files(tmp_path, {name: piece * 1_000_002})
    with pytest.raises(BadInputError, match=rf"{name}: expected at most 1000000 tokens, found more"):
        read_tokenizer(files_of(tmp_path))


class TestRows:
    @pytest.fixture(scope="class")
    @staticmethod
    def base(tmp_path_factory):
        return tokenizer_with(tmp_path_factory.mktemp("base"))[1]

    def notes(self, tokenizer, base, **config):
        return list(rows_note(tokenizer, base, config, len(base.ids)))

    def test_a_tokenizer_that_fits_says_nothing(self, base):
        assert self.notes(base, base) == []

    @pytest.mark.parametrize(
        ("fields", "why"),
        [
            ({"extra": ["<start>"], "template": "<start>{{ messages }}"}, "the chat template writes it"),
            ({"special": ["<start>"]}, "it is a special token"),
            ({"extra": ["<start>"], "pad_token": "<start>"}, "it is a special token"),
            ({"extra": ["<start>"], "eos_token": "<start>"}, "it is the eos_token"),
        ],
        ids=["template", "special", "pad", "eos"],
    )
    def test_tokens_that_are_used_are_refused(self, base, tmp_path, fields, why):
        _, tokenizer = tokenizer_with(tmp_path, **fields)
        rows = len(base.ids)
        with pytest.raises(
            BadInputError, match=rf"adapter's tokenizer gives '<start>' the id {rows}, {why}, .*{rows} row"
        ):
            self.notes(tokenizer, base)

    def test_others_are_told(self, base, tmp_path):
        _, tokenizer = tokenizer_with(tmp_path, extra=["<start>"])
        [note] = self.notes(tokenizer, base)
        assert note.startswith(f"the tokenizer has 1 tokens with ids beyond the {len(base.ids)} rows")
        assert f"'<start>' ({len(base.ids)})" in note

    def test_what_the_base_has_itself_is_no_fault_of_the_adapter(self, base, tmp_path):
        _, larger = tokenizer_with(tmp_path, special=["<image>"])
        [note] = rows_note(larger, larger, {}, len(base.ids))
        assert "'<image>'" in note

    def test_placeholders_are_never_embedded(self, base, tmp_path):
        _, tokenizer = tokenizer_with(tmp_path, special=["<image>"], template="<image>")
        assert self.notes(tokenizer, base, image_token_id=len(base.ids)) == []
        with pytest.raises(BadInputError, match="the chat template writes it"):
            self.notes(tokenizer, base, pad_token_id=len(base.ids))


class TestStops:
    def notes(self, tmp_path, tokenizer, generation=None, config=None):
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
        return list(stop_notes(tokenizer, files_of(tmp_path), config or {}))

    @pytest.mark.parametrize("stops", [1, [0, 1], None], ids=str)
    def test_agreement_says_nothing(self, tmp_path, stops):
        _, tokenizer = tokenizer_with(tmp_path)
        assert self.notes(tmp_path, tokenizer, stops) == []

    @pytest.mark.parametrize("config", [{"eos_token_id": 0}, {"text_config": {"eos_token_id": [0]}}], ids=str)
    def test_the_end_of_a_tokenizer(self, tmp_path, config):
        _, tokenizer = tokenizer_with(tmp_path, template="{{ messages }}")
        [note] = self.notes(tmp_path, tokenizer, config=config)
        assert note.startswith("the tokenizer ends at '<|end|>' (id 1) and config.json stops at '<|begin|>' (id 0): ")

    @pytest.mark.parametrize(
        ("template", "mark"),
        [
            ("{% for m in messages %}{{ m['content'] }}<stop>{% endfor %}", "<stop>"),
            ("{{ '<go>' + m.content | trim + '<stop>\\n' }}", "<stop>"),
            ("{{- '<go>' }}{{- content }}{% if x %}{% endif %}{{- '<|im_end|>\\n' }}", "<|im_end|>"),
            ("{{ '<go>' + m['content'] }}{{ eos_token }}", None),
        ],
    )
    def test_the_end_of_a_turn(self, tmp_path, template, mark):
        _, tokenizer = tokenizer_with(tmp_path, special=["<go>", "<stop>", "<|im_end|>"], template=template)
        notes = self.notes(tmp_path, tokenizer, [1])
        assert [f"ends a turn with '{mark}'" in note for note in notes] == [True] * (mark is not None)
        assert self.notes(tmp_path, tokenizer, [1, tokenizer.ids.get(mark, 1)]) == []


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "tokenizer.json").touch()
    with (tmp_path / "tokenizer.json").open("ab") as file:
        file.truncate(1 << 40)  # a sparse TiB
    with pytest.raises(BadInputError, match=r"tokenizer\.json: expected a file of at most"):
        read_tokenizer(files_of(tmp_path))


NO_TOKENIZERS = {
    "cut": "{",
    "deep": "[" * 100_000,
    "digits": '{"model": ' + "9" * 5000 + "}",
    "list": "[1]",
    "nested": '{"model": ' * 61 + "1" + "}" * 61,
    "half of a character": '{"model": {"vocab": {"\\ud800": 1}}}',
    "values": '{"model": {"vocab": [' + "{}," * 4_000_000 + "{}]}}",  # 320 MB, were it parsed
}


@pytest.mark.parametrize("text", NO_TOKENIZERS.values(), ids=NO_TOKENIZERS)
def test_what_is_no_tokenizer_is_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(BadInputError, match=r"tokenizer\.json: (field model: )?expected"):
        read_tokenizer(files_of(tmp_path))
