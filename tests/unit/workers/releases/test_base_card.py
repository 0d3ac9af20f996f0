"""The metadata of a base's card: what of it a release keeps, and what it does not believe."""

import pytest

from workers.releases.base_card import BaseCard, read_base_card


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


@pytest.mark.parametrize(
    "value",
    [
        *("{a: b}", "[[a], b]", "5", "2024-01-01", "null", "!!python/object:os.system x", "9" * 5000),
        *('"a\\0b"', '"a\\e[31m"', '"a\\u202eb"', "x" * 3000),
        f"[{','.join(f't{number}' for number in range(9000))}]",
    ],
)
def test_what_is_no_text_is_left_out(tmp_path, value):
    assert read(tmp_path, f"---\nlicense: {value}\n---\n") == BaseCard()


@pytest.mark.parametrize(
    ("block", "kept", "left"),
    [
        ("language: no", {"language": "no"}, ()),
        ("language: [en, no]\ntags: [chat, on, 7b]", {"language": ["en", "no"], "tags": ["chat", "on", "7b"]}, ()),
        ("tags: [chat, 2024, ok]", {"tags": ["chat", "ok"]}, ("tags",)),
        ('tags: [chat, "a\\u202eb"]', {"tags": ["chat"]}, ("tags",)),
        ("language: English", {}, ("language",)),
        ("language: [en, Deutsch, zh-CN]", {"language": ["en", "zh-CN"]}, ("language",)),
        ("pipeline_tag: [a, b]", {}, ("pipeline_tag",)),
        ("license: MIT", {"license": "mit"}, ()),
        ("license: [Apache-2.0, llama3]", {"license": ["apache-2.0", "llama3"]}, ()),
        ("license: Apache License 2.0", {"license": "other", "license_name": "apache-license-2.0"}, ()),
        ("license: other\nlicense_name: My Terms v1", {"license": "other", "license_name": "my-terms-v1"}, ()),
        ("license: {name: mine}", {}, ("license",)),
    ],
)
def test_values_are_such_as_the_hub_takes(tmp_path, block, kept, left):
    card = read(tmp_path, f"---\n{block}\n---\n")
    assert card.metadata == kept
    assert card.left == left


@pytest.mark.parametrize(
    "block",
    ["license: [", "- a\n- b", "[" * 60_000, "a: " + "x" * 70_000, 'license: "\\ud800"'],
    ids=["cut", "list", "deep", "long", "half a pair"],
)
def test_what_is_no_metadata_is_not_readable(tmp_path, block):
    assert read(tmp_path, f"---\n{block}\n---\n") == BaseCard(is_readable=False)


@pytest.mark.parametrize(
    "other",
    [
        (
            '"model-index":\n- name: x\n  results:\n  - task: {type: a}\n    dataset: {type: b, name: c}\n'
            "    metrics: [{type: acc, value: 1}]\n    source: abc\n"
        ),
        "? model-index\n: abc\n",
        "".join(
            f"{letter}0: &{letter}0 [x, x]\n"
            + "".join(f"{letter}{n}: &{letter}{n} [*{letter}{n - 1}, *{letter}{n - 1}]\n" for n in range(1, 40))
            for letter in "ab"
        )
        + "tags: [*a39, *b39]\n",
        f"eval_results: {'9' * 5000}\n",
        "self: 1\nignore_metadata_errors: false\n",
    ],
    ids=["quoted", "complex key", "aliases", "digits", "arguments"],
)
@pytest.mark.timeout(20)
def test_other_fields_do_not_matter(tmp_path, other):
    assert read(tmp_path, f"---\nlicense: mit\n{other}---\n").metadata == {"license": "mit"}


def test_a_huge_card_is_not_read(tmp_path):
    with (tmp_path / "README.md").open("wb") as file:
        file.truncate(1 << 40)  # a sparse TiB
    assert read_base_card(tmp_path) == BaseCard(is_readable=False)
