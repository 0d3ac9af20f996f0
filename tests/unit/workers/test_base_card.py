"""The metadata of a base's card: what of it a release keeps, and what it does not believe."""

import pytest

from workers.base_card import BaseCard, read_base_card


def read(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    return read_base_card(tmp_path)


def test_no_card_says_nothing(tmp_path):
    assert read_base_card(tmp_path) == read(tmp_path, "# Text\n") == read(tmp_path, "---\n---\n# Text") == BaseCard()


def test_what_holds_for_the_release_is_kept_as_it_stands(tmp_path):
    card = read(
        tmp_path,
        "---\nlicense: llama3\nlanguage:\n- en\ntags: [a, b]\nbase_model: org/a\nwidget:\n- text: x\n"
        "model-index:\n- name: " + "x" * 100_000 + "\n  results: []\npipeline_tag: text-generation\n---\n# Text",
    )
    assert card.is_readable
    assert card.metadata == {
        "license": "llama3",
        "language": ["en"],
        "tags": ["a", "b"],
        "base_model": "org/a",
        "pipeline_tag": "text-generation",
    }
    assert card.texts("base_model") == ["org/a"]
    assert card.texts("license_name") == []


@pytest.mark.parametrize("value", ["{a: b}", "[[a], b]", "5", "2024-01-01", "null"])
def test_what_is_no_text_is_left_out(tmp_path, value):
    assert read(tmp_path, f"---\nlicense: {value}\n---\n") == BaseCard()


@pytest.mark.parametrize(
    "block",
    ["license: [", "- a\n- b", "license: !!python/object:os.system x", "[" * 5000, "a: " + "x" * 70_000],
    ids=["cut", "list", "object", "deep", "long"],
)
def test_what_is_no_metadata_is_not_readable(tmp_path, block):
    assert read(tmp_path, f"---\n{block}\n---\n") == BaseCard(is_readable=False)


def test_a_huge_card_is_not_read(tmp_path):
    with (tmp_path / "README.md").open("wb") as file:
        file.truncate(1 << 40)  # a sparse TiB
    assert read_base_card(tmp_path) == BaseCard(is_readable=False)
