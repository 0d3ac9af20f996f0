"""What a release takes over from its base and what from the adapter, from directories without weights."""

import json
import os
import re
from pathlib import Path
from typing import ClassVar

import pytest
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from jobs.errors import BadInputError, NotFoundError, UnsupportedError
from jobs.locations import LocalPath
from tests.releases import write_files
from workers.releases.shipment import plan_shipment, shipped_files
from workers.sources.belongings import belongs, is_legal, is_vocabulary, ships
from workers.sources.code_files import leave_out
from workers.sources.fetch import fetch_base
from workers.sources.listing import LocalFiles


def tokenizer(vocabulary=("a", "b"), **fields):
    """Return the bytes of a fast tokenizer with some tokens."""
    model = {"type": "BPE", "vocab": {token: id_ for id_, token in enumerate(vocabulary)}}
    return json.dumps({"model": model | fields, "added_tokens": []}).encode()


def ship(tmp_path, base, adapter):
    """Plan the shipment of two directories; return it, and whose each file is."""
    for name, files in (("base", base), ("adapter", adapter)):
        (tmp_path / name).mkdir()
        write_files(tmp_path / name, files)
    shipment = plan_shipment(tmp_path / "base", tmp_path / "adapter")
    return shipment, {name: path.relative_to(tmp_path).parts[0] for name, path in shipment.files.items()}


@pytest.mark.parametrize(
    "name",
    [
        *("LICENSE", "license.md", "LICENCE.txt", "COPYING", "MODEL_LICENSE", "LICENSE-MODEL", "LICENSE-APACHE-2.0"),
        *("Notice.txt", "NOTICES", "USE_POLICY.md", "Acceptable Use Policy.pdf", "Llama License Agreement.pdf"),
        *("third_party_notices.txt", "ThirdPartyNotices.md", "TERMS_OF_USE.md", "模型许可协议.pdf", "EULA.html"),
        *("TERMS", "terms.md", "Terms and Conditions.pdf", "OpenRAIL.md", "CreativeML_Open_RAIL-M.pdf", "利用規約.pdf"),
    ],
)
def test_licences_of_every_name_belong(name):
    assert belongs(name)
    assert ships(name)


@pytest.mark.parametrize("name", ["license_plates.safetensors", "licenses.py", "notice.png", "copying.zip", ".license"])
def test_what_only_sounds_like_a_licence_does_not(name):
    assert not belongs(name)
    assert not is_legal(name) or name.startswith(".")


def test_every_vocabulary_file_that_transformers_knows_belongs():
    kinds = [kind for pair in TOKENIZER_MAPPING.values() for kind in (pair if isinstance(pair, tuple) else (pair,))]
    names = {name for kind in kinds for name in (getattr(kind, "vocab_files_names", None) or {}).values()}
    settings = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    assert len(names) > 15
    assert {name for name in names - settings if not is_vocabulary(name)} == set()


@pytest.mark.parametrize(
    "name",
    [
        *(
            "params.json",
            "hf_quant_config.json",
            "quantize_config.json",
            "consolidated.safetensors",
            "consolidated.json",
        ),
        *("trainer_state.json", "training_args.bin", "optimizer.pt", "eval_results.json", "model.gguf", "config.json"),
        *("pytorch_model.bin.index.json", "model.safetensors.index.json", "adapter_config.json", "manifest.json"),
    ],
)
def test_what_describes_other_weights_is_not_shipped(name):
    assert not (belongs(name) and ships(name))


class TestVocabulary:
    FORMS = ("tokenizer.model", "source.spm", "x.vocab", "merges.txt")

    @pytest.mark.parametrize(
        ("brought", "stay"),
        [
            (tokenizer(), True),
            (tokenizer(merges=[["a", "b"]]), True),  # a newer library writes merges as pairs
            (tokenizer(("a", "b", "c")), False),
            (tokenizer(("b", "a")), False),
        ],
        ids=["same", "written anew", "more", "other order"],
    )
    def test_other_forms_stay_where_it_is_the_bases(self, tmp_path, brought, stay):
        base = {"tokenizer.json": tokenizer(), **dict.fromkeys(self.FORMS, b"base"), "special_tokens_map.json": b"{}"}
        shipment, whose = ship(tmp_path, base, {"tokenizer.json": brought, "tokenizer_config.json": b"{}"})
        assert (whose["tokenizer.json"], whose["tokenizer_config.json"]) == ("adapter", "adapter")
        assert [whose.get(name) for name in self.FORMS] == ["base" if stay else None] * 4
        assert "special_tokens_map.json" not in whose
        assert ["merges.txt, source.spm, tokenizer.model, x.vocab of the base" in n for n in shipment.notes] == (
            [] if stay else [True]
        )

    def test_settings_alone_go_with_the_bases_vocabulary(self, tmp_path):
        base = {"tokenizer.json": tokenizer(), "tokenizer.model": b"base", "tokenizer_config.json": b"{}"}
        _, whose = ship(tmp_path, base, {"tokenizer_config.json": b'{"a": 1}', "special_tokens_map.json": b"{}"})
        assert whose == {
            "tokenizer.json": "base",
            "tokenizer.model": "base",
            "tokenizer_config.json": "adapter",
            "special_tokens_map.json": "adapter",
        }

    def test_a_slow_tokenizer_of_the_adapter_is_never_mixed_with_a_fast_one(self, tmp_path):
        base = {"tokenizer.json": tokenizer(), "vocab.json": b"{}", "merges.txt": b"a b", "x.tiktoken": b"base"}
        shipment, whose = ship(tmp_path, base, {"vocab.json": b"{}", "merges.txt": b"a b"})
        assert whose == {"vocab.json": "adapter", "merges.txt": "adapter", "x.tiktoken": "base"}
        assert ["and tokenizer.json of the base stays behind" in note for note in shipment.notes] == [True]


class TestTemplates:
    """The template that a base holds in its tokenizer_config.json, as the Hub's models did before 2025."""

    @pytest.mark.parametrize(
        "adapter",
        [{"tokenizer.json": tokenizer()}, {"tokenizer.json": tokenizer(), "tokenizer_config.json": b"{}"}],
        ids=["tokenizer", "with settings"],
    )
    def test_it_stays_where_the_adapters_tokenizer_has_none(self, tmp_path, adapter):
        base = {"tokenizer.json": tokenizer(), "tokenizer_config.json": b'{"chat_template": "{{ messages }}"}'}
        shipment, _ = ship(tmp_path, base, adapter)
        assert shipment.templates == {"chat_template.jinja": "{{ messages }}"}

    def test_each_of_several_becomes_a_file(self, tmp_path):
        several = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
        base = {"tokenizer_config.json": json.dumps({"chat_template": several}).encode()}
        shipment, _ = ship(tmp_path, base, {"tokenizer_config.json": b"{}"})
        assert shipment.templates == {"chat_template.jinja": "a", "additional_chat_templates/rag.jinja": "b"}

    @pytest.mark.parametrize(
        ("base", "adapter"),
        [
            ({}, {}),
            ({}, {"tokenizer_config.json": b'{"chat_template": "mine"}'}),
            ({}, {"tokenizer_config.json": b"{}", "chat_template.jinja": b"mine"}),
            ({"chat_template.jinja": b"a file wins"}, {"tokenizer_config.json": b"{}"}),
        ],
        ids=["no tokenizer", "its own", "its own file", "file of the base"],
    )
    def test_it_is_not_written_where_there_is_another(self, tmp_path, base, adapter):
        base = {"tokenizer_config.json": b'{"chat_template": "old"}', **base}
        assert ship(tmp_path, base, adapter)[0].templates == {}

    @pytest.mark.parametrize("name", ["../../up", "", 5, "a/b"])
    def test_a_name_that_no_file_has_is_refused(self, tmp_path, name):
        several = [{"name": name, "template": "a"}]
        base = {"tokenizer_config.json": json.dumps({"chat_template": several}).encode()}
        with pytest.raises(BadInputError, match="chat_template: expected names of files"):
            ship(tmp_path, base, {"tokenizer_config.json": b"{}"})

    def test_named_templates_that_the_adapter_does_not_bring_are_told(self, tmp_path):
        several = [{"name": name, "template": "a"} for name in ("default", "rag", "tool_use")]
        mine = {"chat_template.jinja": b"x", "additional_chat_templates/rag.jinja": b"x"}
        for name, base in (
            ("inside", {"tokenizer_config.json": json.dumps({"chat_template": several}).encode()}),
            ("beside", {f"additional_chat_templates/{name}.jinja": b"a" for name in ("rag", "tool_use")}),
        ):
            (tmp_path / name).mkdir()
            [note] = ship(tmp_path / name, base, mine)[0].notes
            assert "additional_chat_templates/tool_use.jinja of the base stays behind" in note
            assert "rag" not in note

    @pytest.mark.parametrize(
        ("base", "written"),
        [
            ({"chat_template.jinja": b"base"}, {"chat_template.jinja": "mine"}),
            ({"tokenizer_config.json": b'{"chat_template": "base"}'}, {"chat_template.jinja": "mine"}),
            ({"chat_template.json": b'{"chat_template": "base"}'}, {}),
            ({"chat_template.json": b"{}", "chat_template.jinja": b"base"}, {"chat_template.jinja": "mine"}),
        ],
    )
    def test_what_processors_alone_read_is_written_for_tokenizers(self, tmp_path, base, written):
        shipment, _ = ship(tmp_path, base, {"chat_template.json": b'{"chat_template": "mine"}'})
        assert shipment.templates == written
        assert shipment.files["chat_template.json"] == tmp_path / "adapter" / "chat_template.json"
        assert "chat_template.jinja" not in shipment.files


def image_processor(tmp_path, shipment):
    """Write the processor files of a release; return what transformers takes for its image processor."""
    for name, path in shipment.files.items():
        (tmp_path / name).write_bytes(path.read_bytes())
    for name, document in shipment.documents.items():
        (tmp_path / name).write_text(json.dumps(document))
    return ImageProcessingMixin.get_image_processor_dict(tmp_path)[0]


class TestProcessors:
    OWN = {  # noqa: RUF012
        "processor_config.json": b'{"processor_class": "LlavaProcessor", "patch_size": 14}',
        "preprocessor_config.json": b'{"image_processor_type": "A"}',
        "video_preprocessor_config.json": b'{"video_processor_type": "V"}',
    }
    NESTED = (
        b'{"patch_size": 14, "image_processor": {"image_processor_type": "A"}, '
        b'"video_processor": {"video_processor_type": "V"}}'
    )

    def test_what_the_adapter_has_no_other_of_stays(self, tmp_path):
        brought = {"preprocessor_config.json": b'{"image_processor_type": "B"}'}
        shipment, whose = ship(tmp_path, self.OWN, brought)
        assert whose == dict.fromkeys(self.OWN, "base") | {"preprocessor_config.json": "adapter"}
        assert shipment.documents == {}

    def test_a_part_that_the_adapter_nests_takes_the_place_of_its_file(self, tmp_path):
        brought = {"processor_config.json": b'{"image_processor": {"image_processor_type": "B"}}'}
        shipment, whose = ship(tmp_path, self.OWN, brought)
        assert whose == {"processor_config.json": "adapter", "video_preprocessor_config.json": "base"}
        assert image_processor(tmp_path, shipment) == {"image_processor_type": "B"}

    def test_a_file_takes_the_place_of_the_part_that_the_base_nests(self, tmp_path):
        brought = {"preprocessor_config.json": b'{"image_processor_type": "B"}'}
        shipment, whose = ship(tmp_path, {"processor_config.json": self.NESTED}, brought)
        assert whose == {"preprocessor_config.json": "adapter"}
        assert shipment.documents == {
            "processor_config.json": {"patch_size": 14, "video_processor": {"video_processor_type": "V"}}
        }
        assert image_processor(tmp_path, shipment) == {"image_processor_type": "B"}

    def test_parts_that_the_adapter_does_not_nest_stay(self, tmp_path):
        brought = {"processor_config.json": b'{"image_processor": {"image_processor_type": "B"}}'}
        shipment, _ = ship(tmp_path, {"processor_config.json": self.NESTED}, brought)
        parts = {"image_processor": {"image_processor_type": "B"}, "video_processor": {"video_processor_type": "V"}}
        assert shipment.documents == {"processor_config.json": parts}


class TestCode:
    CONFIG = json.dumps({"auto_map": {"AutoModel": "m.Model", "AutoConfig": "org/r--c.Config"}}).encode()

    def test_a_reference_without_its_file_is_left_out_and_told(self, tmp_path):
        pipelines = {"task": {"impl": "pipe.Pipe", "pt": ["AutoModel"]}}
        config = {"auto_map": {"AutoModel": "m.Model", "AutoConfig": "org/r--c.Config"}, "custom_pipelines": pipelines}
        shipment, whose = ship(
            tmp_path, {"config.json": json.dumps(config).encode(), "m.py": b"from .gone import x"}, {}
        )
        assert shipment.broken == {"m.Model": "gone.py", "pipe.Pipe": "pipe.py"}
        assert whose == {}
        assert ["'m.Model' needs 'gone.py', 'pipe.Pipe' needs 'pipe.py'" in note for note in shipment.notes] == [True]
        leave_out(config, shipment.broken)
        assert config["auto_map"] == {"AutoConfig": "org/r--c.Config"}
        leave_out(config, ["m.Model"])
        assert config["auto_map"] == {"AutoConfig": "org/r--c.Config"}

    def test_half_a_pair_stays(self):
        config = {
            "text_config": {"auto_map": {"AutoTokenizer": ["slow.T", "fast.T"]}},
            "auto_map": {"X": ["slow.T", None]},
        }
        leave_out(config, ["slow.T"])
        assert config == {"text_config": {"auto_map": {"AutoTokenizer": [None, "fast.T"]}}}

    def test_code_of_an_adapters_tokenizer_is_found_beside_it_or_the_base_and_told(self, tmp_path):
        settings = json.dumps({"auto_map": {"AutoTokenizer": ["mine.T", "ours.T"]}}).encode()
        shipment, whose = ship(
            tmp_path,
            {"ours.py": b"", "deep.py": b"", "stray.py": b"", "tokenizer.json": tokenizer()},
            {"tokenizer_config.json": settings, "mine.py": b"from .deep import x"},
        )
        assert {name: whose.get(name) for name in ("mine.py", "deep.py", "ours.py", "stray.py")} == {
            "mine.py": "adapter",
            "deep.py": "base",
            "ours.py": "base",
            "stray.py": None,
        }
        assert ["mine.py" in note and "trust_remote_code" in note for note in shipment.notes] == [True]

    def test_an_adapter_cannot_replace_code_of_the_base(self, tmp_path):
        base = {"config.json": self.CONFIG, "m.py": b"theirs"}
        settings = json.dumps({"auto_map": {"AutoTokenizer": ["m.Tokenizer", None]}}).encode()
        with pytest.raises(BadInputError, match=r"adapter/m\.py and .*base/m\.py differ"):
            ship(tmp_path, base, {"tokenizer_config.json": settings, "m.py": b"other"})

    @pytest.mark.parametrize("reference", ["../up.Model", "/etc/passwd.Model", "..m.Model", "a/../../m.Model", "m"])
    def test_references_lead_nowhere_else(self, tmp_path, reference):
        (tmp_path / "up.py").write_text("")
        config = json.dumps({"auto_map": {"AutoModel": reference}}).encode()
        _, whose = ship(tmp_path, {"config.json": config}, {})
        assert whose == {}


class TestParts:
    """Files that real models ask for beside their weights."""

    def test_what_models_ask_for_by_name_ships(self, tmp_path):
        files = dict.fromkeys(
            ("spk_dict.pt", "Roboto-Regular.ttf", "adapter.fra.safetensors", "x.yaml", "vocab.pkl"), b""
        )
        shipment, whose = ship(tmp_path, files, {})
        assert whose.keys() == files.keys()
        assert ["(spk_dict.pt, vocab.pkl)" in note for note in shipment.notes] == [True]

    @pytest.mark.parametrize(
        ("told_by", "inner"),
        [
            ("alphabet.json", ("language_model/5gram.bin", "language_model/unigrams.txt")),
            ("speaker_embeddings_path.json", ("speaker_embeddings/v2/a.npy",)),
        ],
    )
    def test_folders_ship_beside_the_file_that_tells_of_them(self, tmp_path, told_by, inner):
        for name, files in (("with", (told_by, *inner)), ("without", inner)):
            (tmp_path / name).mkdir()
            shipment, whose = ship(tmp_path / name, dict.fromkeys(files, b""), {})
            assert whose.keys() == (set(files) if name == "with" else set())
            assert [inner[0].partition("/")[0] + "/ of the base stays" in note for note in shipment.notes] == (
                [] if name == "with" else [True]
            )

    def test_the_second_tokenizer_of_a_processor_ships_the_adapters_where_it_has_one(self, tmp_path):
        second = {"q/tokenizer_config.json": b"{}", "q/vocab.txt": b"a"}
        trained = {"checkpoint-5/tokenizer_config.json": b"{}", "checkpoint-5/model.safetensors": b""}
        _, whose = ship(tmp_path, {**second, "q/special_tokens_map.json": b"{}", **trained}, second)
        assert whose == dict.fromkeys(second, "adapter")
        (tmp_path / "alone").mkdir()
        _, whose = ship(tmp_path / "alone", second, {})
        assert whose == dict.fromkeys(second, "base")

    def test_what_is_not_known_is_told(self, tmp_path):
        known = ("README_zh.md", "a.png", "run.py", "pytorch_model.bin", "onnx/x.onnx", ".git/config", "params.json")
        files = dict.fromkeys(("voices.pt", "world.npz", "parts/a.bin", "config.json", *known), b"{}")
        shipment, whose = ship(tmp_path, files, {})
        assert whose == {}
        assert shipment.strays == ("parts/", "voices.pt", "world.npz")
        assert ["parts/, voices.pt, world.npz of the base stays behind" in note for note in shipment.notes] == [True]

    def test_they_count_in_the_digest_of_the_base(self, tmp_path):
        write_files(tmp_path / "base", {"config.json": b"{}", "model.safetensors": b"", "spk_dict.pt": b"a"})
        before = fetch_base(LocalPath(tmp_path / "base"), tmp_path).digest
        write_files(tmp_path / "base", {"spk_dict.pt": b"b"})
        assert fetch_base(LocalPath(tmp_path / "base"), tmp_path).digest != before


def test_the_adapters_licence_ships_beside_the_bases(tmp_path):
    base = {"LICENSE": b"base", "NOTICE": b"of both"}
    adapter = {"LICENSE": b"adapter", "NOTICE": b"of both", "Terms of use.md": b"adapter"}
    shipment, whose = ship(tmp_path, base, adapter)
    assert shipment.files["LICENSE.adapter"] == tmp_path / "adapter" / "LICENSE"
    assert whose == {
        "LICENSE": "base",
        "NOTICE": "base",
        "LICENSE.adapter": "adapter",
        "Terms of use.md.adapter": "adapter",
    }


def test_names_that_differ_by_the_form_of_a_letter_alone_are_refused(tmp_path):
    with pytest.raises(BadInputError, match="alone, or in the form of a letter"):
        ship(tmp_path, {"license \u00e9.txt": b"", "license e\u0301.txt": b""}, {})


def test_names_that_differ_by_case_alone_are_refused(tmp_path):
    with pytest.raises(BadInputError, match=r"license and .*LICENSE differ in upper and lower case alone"):
        ship(tmp_path, {"LICENSE": b"", "license": b""}, {})


class TestFolders:
    def test_pickles_of_modules_go_along_and_are_told_unless_there_is_better(self, tmp_path):
        modules = json.dumps([{"path": "1_Dense"}, {"path": "2_Dense/"}, {"path": "3_Normalize"}]).encode()
        files = {
            "modules.json": modules,
            "1_Dense/pytorch_model.bin": b"pickle",
            "1_Dense/part/config.json": b"{}",
            "2_Dense/pytorch_model.bin": b"pickle",
            "2_Dense/model.safetensors": b"safe",
            "other/config.json": b"{}",
        }
        shipment, whose = ship(tmp_path, files, {})
        assert whose.keys() == files.keys() - {"2_Dense/pytorch_model.bin", "other/config.json"}
        assert ["1_Dense/pytorch_model.bin" in note for note in shipment.notes if "pickles" in note] == [True]

    MODULES = json.dumps(
        [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense", "type": "custom_dense.Dense"}]
    ).encode()
    DENSE: ClassVar = {
        "modules.json": MODULES,
        "1_Pooling/config.json": b"{}",
        "2_Dense/config.json": b"{}",
        "2_Dense/model.safetensors": b"weights",
        "custom_dense.py": b"",
    }

    def test_modules_with_the_weights_of_the_base_stay_its_own(self, tmp_path):
        theirs = self.DENSE | {"modules.json": b" " + self.MODULES}
        shipment, whose = ship(tmp_path, self.DENSE | {"LICENSE": b""}, theirs)
        assert whose == dict.fromkeys([*self.DENSE, "LICENSE"], "base")
        assert shipment.notes == ()

    def test_modules_trained_with_an_adapter_take_the_place_of_the_bases_and_are_told(self, tmp_path):
        theirs = self.DENSE | {"2_Dense/model.safetensors": b"trained", "config_sentence_transformers.json": b"{}"}
        theirs |= {"stray/model.safetensors": b"none"}
        shipment, whose = ship(
            tmp_path, self.DENSE | {"2_Dense/extra.json": b"{}", "3_Normalize/config.json": b"{}"}, theirs
        )
        taken = (self.DENSE.keys() | {"config_sentence_transformers.json"}) - {"custom_dense.py"}
        assert whose == dict.fromkeys(taken, "adapter") | {"custom_dense.py": "base"}
        assert ["2_Dense/model.safetensors" in note for note in shipment.notes] == [True, False]
        assert shipment.strays == ("3_Normalize/",)

    def test_modules_that_the_base_does_not_have_come_with_the_adapter(self, tmp_path):
        _, whose = ship(tmp_path, {"config.json": b"{}"}, self.DENSE)
        assert whose == dict.fromkeys(self.DENSE, "adapter")

    def test_pickled_modules_of_an_adapter_are_refused_unless_they_are_the_bases(self, tmp_path):
        pickled = {"modules.json": self.MODULES, "2_Dense/pytorch_model.bin": b"pickle"}
        assert ship(tmp_path, pickled, pickled)[1] == dict.fromkeys(pickled, "base")
        (tmp_path / "adapter" / "2_Dense" / "pytorch_model.bin").write_bytes(b"trained")
        with pytest.raises(UnsupportedError, match=r"2_Dense/pytorch_model\.bin: .* save the module as safetensors"):
            plan_shipment(tmp_path / "base", tmp_path / "adapter")

    @pytest.mark.parametrize("path", ["../adapter", "/etc", 5, "a/../b", "a\\b"])
    def test_folders_outside_are_refused(self, tmp_path, path):
        with pytest.raises(BadInputError, match=r"modules\.json: path: expected the name of a folder"):
            ship(tmp_path, {"modules.json": json.dumps([{"path": path}]).encode()}, {})

    @pytest.mark.parametrize("folder", ["1_Pooling", "additional_chat_templates", "custom_generate", "licenses", "tok"])
    def test_a_folder_that_a_link_puts_elsewhere_is_refused(self, tmp_path, folder):
        write_files(tmp_path / "secret", {"key.json": b"{}", "tokenizer_config.json": b"{}"})
        write_files(tmp_path / "base", {"modules.json": b'[{"path": "1_Pooling"}]'})
        (tmp_path / "base" / folder).symlink_to(tmp_path / "secret")
        with pytest.raises(BadInputError, match=rf"{folder}: expected a folder of this directory, found a link to"):
            plan_shipment(tmp_path / "base", tmp_path / "secret")

    def test_a_folder_that_is_a_link_within_the_directory_ships(self, tmp_path):
        write_files(tmp_path / "base", {"modules.json": b'[{"path": "1_Pooling"}]', "v2/config.json": b"{}"})
        (tmp_path / "base" / "1_Pooling").symlink_to("v2")
        write_files(tmp_path / "adapter", {"adapter_config.json": b"{}"})
        files = plan_shipment(tmp_path / "base", tmp_path / "adapter").files
        assert files.keys() == {"modules.json", "1_Pooling/config.json"}
        (tmp_path / "base" / "v2" / "inner").symlink_to(tmp_path)
        with pytest.raises(BadInputError, match="inner: expected a folder, found a link to one"):
            plan_shipment(tmp_path / "base", tmp_path / "adapter")

    def test_more_references_to_code_than_any_model_has_are_refused(self, tmp_path):
        auto_map = {f"Auto{number}": f"m{number}.X" for number in range(1001)}
        write_files(tmp_path, {"config.json": json.dumps({"auto_map": auto_map}).encode()})
        with pytest.raises(
            BadInputError, match=r"config\.json: auto_map: expected at most 1000 references .* found 1001"
        ):
            shipped_files(tmp_path)

    def test_a_list_of_more_modules_than_any_model_has_is_refused(self, tmp_path):
        write_files(tmp_path, {"modules.json": json.dumps([{"path": "x"}] * 1001).encode()})
        with pytest.raises(BadInputError, match=r"modules\.json: expected at most 1000 modules, found 1001"):
            shipped_files(tmp_path)

    def test_files_that_name_others_have_a_size(self, tmp_path):
        with (tmp_path / "modules.json").open("wb") as file:
            file.truncate(1 << 40)  # a sparse TiB
        with pytest.raises(
            BadInputError, match=r"modules\.json: expected a file of at most \d+ bytes, found 1099511627776"
        ):
            shipped_files(Path(tmp_path))


class TestWhatCannotBeOpened:
    """A file that seems not to be there is missed in silence; one that is listed is refused by name."""

    @pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "model.safetensors", "1_Pooling/config.json"])
    @pytest.mark.parametrize(
        ("make", "error"),
        [
            (os.mkfifo, "expected a regular file, found a FIFO"),
            (lambda path: path.symlink_to("gone"), "expected this file"),
        ],
        ids=["fifo", "link to nothing"],
    )
    def test_it_counts_and_is_refused(self, tmp_path, name, make, error):
        write_files(tmp_path, {"modules.json": b'[{"path": "1_Pooling"}]', "1_Pooling/other.json": b"{}"})
        make(tmp_path / name)
        files = LocalFiles(tmp_path)
        assert name in {*files.top(), *files.below("1_Pooling")}
        assert files.has(name)
        with pytest.raises((BadInputError, NotFoundError), match=rf"{re.escape(name)}: {error}"):
            files.read(name)
        write_files(tmp_path, {"config.json": b"{}", "other.safetensors": b""})
        with pytest.raises((BadInputError, NotFoundError), match=re.escape(name)):
            fetch_base(LocalPath(tmp_path), tmp_path / "cache")
