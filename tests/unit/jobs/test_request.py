"""Merge requests: ids, keys, defaults, and the fields that are refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs.errors import InvalidValueError
from jobs.parity_policy import Thresholds
from jobs.request import BaseQuantization, MergeRequest, QuantizationOptions
from jobs.sizes import parse_size

PLACES = {"base": "/models/base", "adapter": "/adapters/a", "destination": "/releases/a"}
NF4 = PLACES | {"base_quantization": "nf4"}


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("5GB", 5_000_000_000),
        ("500 MiB", 524_288_000),
        ("1.1gb", 1_100_000_000),
        ("0.29kb", 290),
        ("64", 64),
        ("2 TiB", 2 * 1024**4),
    ],
)
def test_sizes(text, num_bytes):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "5 XB", "-5GB", "5GB\nx", "1e9", "٣GB"])
def test_sizes_refused(text):
    with pytest.raises(InvalidValueError, match="expected a size"):
        parse_size(text)


def test_a_request_without_id_is_named_by_its_content():
    one, same = MergeRequest(**PLACES), MergeRequest(**PLACES)
    assert one.id == same.id
    assert one.id.startswith("merge-")
    assert MergeRequest(**PLACES, priority=1).id != one.id
    labelled = MergeRequest(**PLACES, labels={"a": "1", "b": "2"})
    assert labelled.id == MergeRequest(**PLACES, labels={"b": "2", "a": "1"}).id


def test_new_fields_that_say_nothing_do_not_change_the_name_of_a_request():
    """As the first version named them: the same file submitted again must be the same jobs."""
    places = {"base": "/b", "adapter": "/a", "destination": "/d"}
    assert MergeRequest(**places).id == "merge-ba9e95f3d2936096"
    asked = {"base_quantization": "none", "parity": {"level": "arithmetic"}, "labels": {"team": "x"}}
    assert MergeRequest(**places, **asked).id == "merge-146261388226de8e"


def test_folders_on_the_hub_do_not_change_what_requests_without_them_are():
    """Id and JSON as the version before had them."""
    request = MergeRequest(base="hf://org/base@v1", adapter="hf://org/lora", destination="hf://org/merged")
    assert request.id == "merge-2c0f96948a5df096"
    stored = json.loads(request.model_dump_json(by_alias=True))
    places = {name: stored[name] for name in ("base", "adapter", "destination")}
    assert places == {
        "base": "hf://org/base@v1",
        "adapter": "hf://org/lora@main",
        "destination": "hf://org/merged@main",
    }
    folder = MergeRequest(base="hf://org/base@v1", adapter="hf://org/lora/a", destination="hf://org/merged")
    assert folder.id != request.id
    assert MergeRequest.model_validate_json(folder.model_dump_json(by_alias=True)) == folder
    assert folder.adapter_name == "a"


def test_a_release_is_a_whole_repository():
    with pytest.raises(ValidationError) as caught:
        MergeRequest(base="/b", adapter="/a", destination="hf://org/merged/sub")
    assert "expected a whole repository, hf://owner/name: a release is all of its repository" in str(caught.value)
    with pytest.raises(ValidationError, match="a place outside the base"):
        MergeRequest(base="hf://org/name@main", adapter="/a", destination="hf://org/name")


def test_silent_requests_leave_to_the_base_what_they_merge_into_with_full_parity():
    request = MergeRequest(**PLACES)
    assert request.base_quantization is BaseQuantization.DEFAULT
    assert request.id == MergeRequest(**NF4).id
    assert request.parity.level == "full"


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("id", {"id": "with space"}),
        ("id", {"id": "line\n"}),
        ("id", {"id": "x" * 129}),
        ("id", {"id": "-x"}),
        ("destination", {"destination": "/models/base"}),
        ("destination", {"destination": "/adapters/a/merged"}),
        ("destination", {"base": "s3://bucket/a", "destination": "s3://bucket/a/b"}),
        ("destination", {"destination": "hf://name-without-owner"}),
        ("quantization_options", {"base_quantization": "none", "quantization_options": {"llm_int8_skip_modules": []}}),
        ("base_quantization", {"base_quantization": "int8"}),
        ("dtype", {"dtype": "int8"}),
        ("max_shard_size", {"max_shard_size": 0}),
        ("priority", {"priority": 1001}),
        ("adaptor", {"adaptor": "/adapters/a"}),
        ("parity", {"parity": {"prompts": []}}),
        ("parity", {"parity": {"thresholds": {"max_mean_kl": float("inf")}}}),
        ("parity", {"parity": {"thresholds": {"max_mean_kl": float("nan")}}}),
        ("parity", {"parity": {"thresholds": {"max_rounding_excess": float("inf")}}}),
        ("parity", {"parity": {"thresholds": {"min_top1_agreement": float("nan")}}}),
    ],
)
def test_refuses_and_names_the_field(field, fields):
    with pytest.raises(ValidationError) as caught:
        MergeRequest(**PLACES | fields)
    assert {error["loc"][0] for error in caught.value.errors()} == {field}


def test_mistakes_that_involve_two_fields_are_found_beside_others():
    fields = {"destination": "/models/base/out", "dtype": "int8", "base_quantization": "none"}
    options = {"bnb_4bit_use_double_quant": True}
    with pytest.raises(ValidationError) as caught:
        MergeRequest(**PLACES | fields, quantization_options=options)
    assert {error["loc"][0] for error in caught.value.errors()} == {"destination", "dtype", "quantization_options"}


def test_the_merge_key_depends_on_what_decides_the_bytes_and_on_nothing_else():
    key = MergeRequest(**NF4).merge_key("b", "a")
    assert len(key) == 64
    for same in (
        {"priority": 5},
        {"labels": {"a": "b"}},
        {"destination": "/x"},
        {"id": "n"},
        {"parity": {"level": "arithmetic"}},
        {"compare": True},
    ):
        assert MergeRequest(**NF4 | same).merge_key("b", "a") == key
    keys = {key, MergeRequest(**NF4).merge_key("b", "x"), MergeRequest(**NF4).merge_key("x", "a")}
    for other in (
        {"dtype": "float16"},
        {"max_shard_size": "5GB"},
        {"base_quantization": "none"},
        {"base_quantization": "fp4"},
        {"quantization_options": {"bnb_4bit_use_double_quant": True}},
        {"quantization_options": {"llm_int8_skip_modules": []}},
    ):
        keys.add(MergeRequest(**NF4 | other).merge_key("b", "a"))
    assert len(keys) == 9


def test_what_is_left_to_the_base_is_as_if_it_had_been_said():
    said = MergeRequest(**NF4)
    left = MergeRequest(**PLACES)
    assert left.settled(BaseQuantization.NF4).merge_key("b", "a") == said.merge_key("b", "a")
    assert left.settled(BaseQuantization.STORED).base_quantization is BaseQuantization.STORED
    assert said.settled(BaseQuantization.STORED) is said


def test_what_an_earlier_version_did_not_know_is_not_written_where_it_says_nothing():
    plain = MergeRequest(**PLACES)
    assert '"compare"' not in plain.model_dump_json()
    assert '"texts"' not in plain.model_dump_json()
    told = MergeRequest(**PLACES, compare=True, parity={"texts": ["one", {"prompt": "a ", "completion": "b"}]})
    assert told.id != plain.id
    assert MergeRequest.model_validate_json(told.model_dump_json(by_alias=True)) == told
    assert [text.completion for text in told.parity.texts] == ["one", "b"]


@pytest.mark.parametrize(
    "fields",
    [
        {"compare": True, "parity": {"level": "arithmetic"}},
        {"parity": {"level": "arithmetic", "texts": ["one"]}},
        {"parity": {"texts": [{"prompt": "one"}]}},
        {"parity": {"texts": [""]}},
    ],
)
def test_what_no_model_would_be_asked_is_refused(fields):
    with pytest.raises(ValidationError):
        MergeRequest(**PLACES, **fields)


def test_requests_share_a_pass_when_base_quantization_and_dtype_agree():
    key = MergeRequest(**PLACES).pass_key()
    assert MergeRequest(**PLACES | {"adapter": "/adapters/b", "destination": "/x"}).pass_key() == key
    for other in ({"base": "/models/b"}, {"base_quantization": "none"}, {"dtype": "float16"}):
        assert MergeRequest(**PLACES | other).pass_key() != key
    skips = [None, (), ("a",), ("a", "b")]
    options = [QuantizationOptions(llm_int8_skip_modules=skip) for skip in skips]
    assert len({MergeRequest(**PLACES, quantization_options=option).pass_key() for option in options}) == len(skips)


texts = st.text(st.characters(codec="utf-8"), max_size=20)
stored_texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
requests = st.builds(
    MergeRequest,
    id=st.from_regex(r"([A-Za-z0-9][A-Za-z0-9._-]{0,30})?", fullmatch=True),
    base=st.just("hf://org/base@v1"),
    adapter=st.just("/adapters/a"),
    destination=st.just("s3://bucket/out"),
    base_quantization=st.sampled_from(["nf4", "fp4"]),
    quantization_options=st.builds(
        QuantizationOptions,
        bnb_4bit_use_double_quant=st.booleans(),
        llm_int8_skip_modules=st.none() | st.lists(texts, max_size=2).map(tuple),
    ),
    dtype=st.sampled_from([None, "float32", "float16", "bfloat16"]),
    max_shard_size=st.none() | st.integers(1, 10**15),
    parity=st.fixed_dictionaries(
        {
            "level": st.sampled_from(["full", "arithmetic"]),
            "prompts": st.lists(texts.filter(bool), min_size=1, max_size=3).map(tuple),
            "thresholds": st.builds(Thresholds, max_mean_kl=st.floats(1e-9, 10)),
        }
    ),
    priority=st.integers(-1000, 1000),
    labels=st.dictionaries(stored_texts, stored_texts, max_size=3),
)


@given(requests)
def test_a_stored_request_is_read_back_the_same(request):
    text = request.model_dump_json(by_alias=True)
    again = MergeRequest.model_validate_json(text)
    assert again == request
    assert again.model_dump_json(by_alias=True) == text
    assert json.loads(text)["schema"] == 1


@pytest.mark.parametrize("keep", ["16bit", "8bit"])
def test_numbers_keep_nothing(keep):
    with pytest.raises(ValidationError, match="none beside output '16bit', which keeps all weights as numbers"):
        MergeRequest(**PLACES, keep=keep)


@pytest.mark.parametrize("output", ["fp8_dynamic", "fp8_block", "int8_w8a16"])
def test_8_bits_keep_nothing_in_8_bits(output):
    with pytest.raises(ValidationError, match=f"16bit, as 8bit says nothing for output '{output}'"):
        MergeRequest(**PLACES, output=output, keep="8bit")
    assert MergeRequest(**PLACES, output=output, keep="16bit").keep == "16bit"


@pytest.mark.parametrize("output", ["int4_w4a16", "mxfp4", "nvfp4a16", "as_base"])
@pytest.mark.parametrize("keep", ["16bit", "8bit"])
def test_what_is_kept_decides_the_release_and_so_does_its_line(output, keep):
    asked = PLACES | {"output": output, "base_quantization": "none"}
    line = {"parity": {"thresholds": {"min_survival": 0.75}}}
    requests = [
        MergeRequest(**asked),
        MergeRequest(**asked, keep=keep),
        MergeRequest(**asked, keep=keep, **line),
        MergeRequest(**asked, keep="8bit" if keep == "16bit" else "16bit"),
    ]
    assert len({each.merge_key("0" * 64, "1" * 64) for each in requests}) == 4
    assert MergeRequest(**asked, **line).merge_key("0" * 64, "1" * 64) == requests[0].merge_key("0" * 64, "1" * 64)
    assert "keep" not in requests[0].model_dump_json()
    assert MergeRequest.model_validate_json(requests[1].model_dump_json(by_alias=True)) == requests[1]
    assert len({each.pass_key() for each in requests}) == 1
