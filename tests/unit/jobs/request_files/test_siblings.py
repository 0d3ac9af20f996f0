"""Requests with `outputs`: one for each form, below the destination."""

import json

import pytest

from jobs.request_files.reading import RequestFileError, load_requests


def read(tmp_path, document, name="batch.yaml"):
    path = tmp_path / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return load_requests(path)


FIELDS = {"base": "/bases/a", "adapter": "/adapters/one"}


def test_each_form_is_a_request_of_its_own(tmp_path):
    asked = {**FIELDS, "id": "one", "destination": "/releases/{adapter}", "outputs": ["16bit", "fp8_block", "mxfp4"]}
    found = read(tmp_path, {"requests": [asked]})
    assert [(each.id, str(each.destination), each.output) for each in found] == [
        ("one-16bit", "/releases/one/16bit", "16bit"),
        ("one-fp8_block", "/releases/one/fp8_block", "fp8_block"),
        ("one-mxfp4", "/releases/one/mxfp4", "mxfp4"),
    ]
    assert len({each.pass_key() for each in found}) == 1


def test_each_is_what_asks_for_that_form_alone(tmp_path):
    (sibling,) = read(tmp_path, {"requests": [{**FIELDS, "destination": "/releases/one", "outputs": ["mxfp4"]}]})
    alone = {**FIELDS, "destination": "/releases/one/mxfp4", "output": "mxfp4"}
    assert read(tmp_path, {"requests": [alone]}) == (sibling,)


def test_bf16_is_plain_numbers_of_that_dtype(tmp_path):
    (found,) = read(tmp_path, {"requests": [{**FIELDS, "destination": "/releases/one/", "outputs": ["bf16"]}]})
    assert (found.output, found.dtype, str(found.destination)) == ("16bit", "bfloat16", "/releases/one/bf16")


def test_beside_bf16_all_are_of_that_dtype_and_one_pass(tmp_path):
    """But for the base's own form, which has the base's."""
    asked = {**FIELDS, "destination": "/releases/one", "outputs": ["mxfp4", "bf16", "as_base"]}
    found = {each.output: each for each in read(tmp_path, {"requests": [asked]})}
    assert {form: each.dtype for form, each in found.items()} == {
        "16bit": "bfloat16",
        "mxfp4": "bfloat16",
        "as_base": None,
    }
    assert found["16bit"].pass_key() == found["mxfp4"].pass_key()


def test_on_the_hub_forms_are_repositories(tmp_path):
    asked = {**FIELDS, "destination": "hf://me/one@next", "outputs": ["as_base"]}
    (found,) = read(tmp_path, {"requests": [asked]})
    assert str(found.destination) == "hf://me/one-as_base@next"


@pytest.mark.parametrize("section", ["defaults", "matrix"])
def test_where_many_requests_share_them(tmp_path, section):
    shared = {"outputs": ["16bit", "mxfp4"]}
    matrix = {"bases": ["/bases/a"], "adapters": ["/adapters/one", "/adapters/two"], "destination": "/r/{adapter}"}
    document = {"defaults": shared, "matrix": matrix} if section == "defaults" else {"matrix": matrix | shared}
    places = [str(each.destination) for each in read(tmp_path, document)]
    assert places == ["/r/one/16bit", "/r/one/mxfp4", "/r/two/16bit", "/r/two/mxfp4"]


def test_in_json_lines_and_csv(tmp_path):
    line = json.dumps({**FIELDS, "destination": "/r/one", "outputs": ["16bit", "mxfp4"]})
    lines = read(tmp_path, line, "batch.jsonl")
    cells = '/bases/a,/adapters/one,/r/one,"[""16bit"",""mxfp4""]"'
    table = read(tmp_path, f"base,adapter,destination,outputs\n{cells}\n", "batch.csv")
    assert lines == table
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"outputs": ["gptq"]}, r"outputs\[0\]: expected one of 16bit, as_base, .*, found 'gptq'"),
        ({"outputs": ["mxfp4", "mxfp4"]}, "destination"),
        ({"outputs": []}, "outputs: expected a list with at least one entry, found an empty list"),
        ({"outputs": "mxfp4"}, "outputs: expected a list"),
        ({"outputs": ["mxfp4"], "output": "mxfp4"}, "expected either output or outputs, found both"),
        ({"outputs": ["as_base"], "dtype": "float16"}, "no dtype beside as_base"),
        ({"outputs": ["bf16"], "dtype": "float16"}, "dtype: expected bfloat16, or none, beside outputs 'bf16'"),
    ],
)
def test_mistakes_are_told_by_field(tmp_path, fields, message):
    with pytest.raises(RequestFileError, match=message):
        read(tmp_path, {"requests": [{**FIELDS, "destination": "/r/one", **fields}]})


def test_every_mistake_of_a_request_is_told_though_outputs_are_wrong(tmp_path):
    with pytest.raises(RequestFileError) as caught:
        read(
            tmp_path, {"requests": [{**FIELDS, "destination": "/r/one", "outputs": ["gptq", "mxfp4"], "priority": "x"}]}
        )
    assert "priority" in str(caught.value)
    assert "gptq" in str(caught.value)


def test_what_is_kept_holds_for_each_form(tmp_path):
    asked = {**FIELDS, "destination": "/releases/one", "outputs": ["int4_w4a16", "mxfp4"], "keep": "8bit"}
    assert [each.keep for each in read(tmp_path, {"requests": [asked]})] == ["8bit", "8bit"]
    with pytest.raises(RequestFileError, match="8bit says nothing for output 'fp8_block'"):
        read(tmp_path, {"requests": [asked | {"outputs": ["mxfp4", "fp8_block"]}]})
    found = read(tmp_path, {"requests": [asked | {"outputs": ["mxfp4", "16bit", "gguf"]}]})
    assert [each.keep for each in found] == ["8bit", None, None]
    with pytest.raises(RequestFileError, match="none beside output 'gguf_q8_0'"):
        read(tmp_path, {"requests": [asked | {"outputs": ["mxfp4", "gguf_q8_0"]}]})


def test_a_matrix_keeps_what_it_says(tmp_path):
    matrix = {"bases": ["/bases/a"], "adapters": ["/adapters/one", "/adapters/two"], "destination": "/r/{adapter}"}
    found = read(tmp_path, {"matrix": {**matrix, "output": "int4_w4a16", "keep": "16bit"}})
    assert [each.keep for each in found] == ["16bit", "16bit"]
