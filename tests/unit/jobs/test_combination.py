"""How several adapters may be combined, and what is refused."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from jobs.combination import Combination, CombinationType
from jobs.locations import LocalPath
from jobs.request import MergeRequest
from jobs.request_files.reading import load_requests

TWO = [{"adapter": "/adapters/a", "weight": 0.5}, {"adapter": "/adapters/b"}]
PLACES = {"base": "/models/base", "destination": "/releases/ab", "base_quantization": "nf4"}
FIELDS = ("density", "majority_sign_method", "svd_rank", "svd_clamp", "svd_full_matrices", "seed")
SVD = {"svd_rank": None, "svd_clamp": None, "svd_full_matrices": True}


def request(adapters=TWO, **how):
    return MergeRequest(**PLACES, adapters=adapters, combination=how)


def places_of(caught):
    return {".".join(map(str, error["loc"])) for error in caught.value.errors()}


def test_several_adapters_have_weights_a_name_and_words():
    made = request(type="ties", density=0.2)
    assert [(str(each.adapter), each.weight) for each in made.weighted] == [("/adapters/a", 0.5), ("/adapters/b", 1.0)]
    assert made.adapter_name == "a-b"
    assert made.adapter_words == "ties of 0.5 x a, 1 x b"
    single = MergeRequest(**PLACES, adapter="/adapters/a")
    assert [(str(each.adapter), each.weight) for each in single.weighted] == [("/adapters/a", 1.0)]
    assert (single.adapter_name, single.adapter_words) == ("a", "a")


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ({"type": "linear"}, {}),
        ({"type": "cat"}, {}),
        ({"type": "svd"}, SVD),
        ({"type": "svd", "svd_rank": 4, "svd_clamp": 0.9, "svd_full_matrices": False}, None),
        ({"type": "ties", "density": 0.5}, {"density": 0.5, "majority_sign_method": "total"}),
        ({"type": "ties_svd", "density": 0.5}, {"density": 0.5, "majority_sign_method": "total", **SVD}),
        ({"type": "dare_linear", "density": 0.5}, {"density": 0.5, "seed": 0}),
        ({"type": "dare_linear_svd", "density": 0.5, "seed": 2}, {"density": 0.5, "seed": 2, **SVD}),
        ({"type": "dare_ties", "density": 1}, {"density": 1.0, "majority_sign_method": "total", "seed": 0}),
        ({"type": "dare_ties_svd", "density": 0.5}, {"density": 0.5, "majority_sign_method": "total", "seed": 0} | SVD),
        ({"type": "magnitude_prune", "density": 0.5}, {"density": 0.5}),
        ({"type": "magnitude_prune_svd", "density": 0.5}, {"density": 0.5, **SVD}),
    ],
)
def test_a_type_has_the_arguments_that_it_uses(given, arguments):
    if arguments is None:
        arguments = {name: value for name, value in given.items() if name != "type"}
    assert Combination(**given).arguments() == arguments


@pytest.mark.parametrize("kind", CombinationType)
def test_a_field_that_the_type_ignores_is_refused_by_name(kind):
    values = {"density": 0.5, "majority_sign_method": "total", "svd_rank": 2, "svd_clamp": 0.9, "seed": 0}
    with pytest.raises(ValidationError) as caught:
        request(type=kind.value, **values, svd_full_matrices=False, svd_driver="gesvd")
    unused = set(FIELDS) - kind.fields
    assert places_of(caught) == {f"combination.{name}" for name in unused | {"svd_driver"}}
    if unused:
        assert f"expected no {min(unused)}, as combination type '{kind}' would ignore it" in str(caught.value)


@pytest.mark.parametrize(
    ("place", "fields"),
    [
        ("adapter", {}),
        ("adapter", {"adapter": "/adapters/a", "adapters": TWO, "combination": {"type": "linear"}}),
        ("combination", {"adapters": TWO}),
        ("combination", {"adapter": "/adapters/a", "combination": {"type": "linear"}}),
        ("combination", {"adapters": TWO[:1], "combination": {"type": "svd"}}),
        ("combination.type", {"adapters": TWO, "combination": {}}),
        ("combination.type", {"adapters": TWO, "combination": {"type": "sequence"}}),
        ("combination.type", {"adapters": TWO, "combination": {"type": "tiess"}}),
        ("combination.density", {"adapters": TWO, "combination": {"type": "ties"}}),
        ("combination.density", {"adapters": TWO, "combination": {"type": "ties", "density": 0}}),
        ("combination.density", {"adapters": TWO, "combination": {"type": "ties", "density": 1.5}}),
        ("combination.seed", {"adapters": TWO, "combination": {"type": "dare_ties", "density": 0.5, "seed": -1}}),
        ("adapters", {"adapters": [], "combination": {"type": "linear"}}),
        (
            "adapters.1.weight",
            {"adapters": [TWO[0], {"adapter": "/b", "weight": "inf"}], "combination": {"type": "cat"}},
        ),
        ("destination", {"adapters": TWO, "combination": {"type": "cat"}, "destination": "/adapters/b/merged"}),
    ],
)
def test_refuses_and_names_the_field(place, fields):
    with pytest.raises(ValidationError) as caught:
        MergeRequest(**PLACES | fields)
    assert places_of(caught) == {place}


def test_in_sequence_is_told_what_to_do():
    with pytest.raises(ValidationError, match="let a second request have the first's release as base"):
        request(type="sequence")


def test_the_merge_key_depends_on_the_combination_and_on_nothing_else():
    key = request(type="dare_linear", density=0.5).merge_key("b", "a")
    assert request(type="dare_linear", density=0.5, seed=0).merge_key("b", "a") == key
    same_bytes_elsewhere = [{"adapter": "/elsewhere/a", "weight": 0.5}, {"adapter": "/elsewhere/b"}]
    assert request(same_bytes_elsewhere, type="dare_linear", density=0.5).merge_key("b", "a") == key
    others = {
        MergeRequest(**PLACES, adapter="/adapters/a").merge_key("b", "a"),
        request(type="dare_linear", density=0.5).merge_key("b", "x"),
        request(type="dare_linear", density=0.4).merge_key("b", "a"),
        request(type="dare_linear", density=0.5, seed=1).merge_key("b", "a"),
        request(type="magnitude_prune", density=0.5).merge_key("b", "a"),
        request([TWO[0], {"adapter": "/adapters/b", "weight": 2}], type="dare_linear", density=0.5).merge_key("b", "a"),
    }
    assert len(others - {key}) == 6


def test_the_keys_of_a_request_for_one_adapter_stay_what_they_are():
    places = {"base": "/models/base", "adapter": "/adapters/a", "destination": "/releases/a"}
    made = MergeRequest(**places, base_quantization="nf4")
    assert made.id == "merge-95278cfbabbf4ee7"
    assert made.merge_key("b", "a") == "fcb1785a8eb3a69d3a46383d92ba6091824aca857d7e8af32b65d3ad62c99610"
    assert not {"adapters", "combination"} & json.loads(made.model_dump_json()).keys()


def test_a_stored_request_is_read_back_the_same():
    made = request(type="dare_ties_svd", density=0.5, svd_rank=3, seed=7)
    text = made.model_dump_json(by_alias=True)
    again = MergeRequest.model_validate_json(text)
    assert again == made
    assert again.model_dump_json(by_alias=True) == text
    assert "adapter" not in json.loads(text)


def test_every_format_takes_several_adapters(write, tmp_path):
    files = {
        "batch.yaml": """\
            defaults:
              base: /b
              destination: s3://b-c/{adapter}
              combination: {type: ties_svd, svd_rank: 4}
            requests:
              - adapters: [{adapter: one, weight: -0.5}, {adapter: /x/two}]
                combination: {density: 0.5}
            """,
        "batch.jsonl": json.dumps(
            {
                "base": "/b",
                "adapters": [{"adapter": "one", "weight": -0.5}, {"adapter": "/x/two", "weight": 1}],
                "combination": {"type": "ties_svd", "density": 0.5, "svd_rank": 4},
                "destination": "s3://b-c/{adapter}",
            }
        ),
        "batch.csv": """\
            base,destination,adapter,adapters,combination.type,combination.density,combination.svd_rank
            /b,s3://b-c/{adapter},,"[{""adapter"": ""one"", ""weight"": -0.5}, {""adapter"":""/x/two""}]",ties_svd,0.5,4
            /b,s3://b-c/{adapter},/x/three,,,,
            """,
    }
    for name, text in files.items():
        first, *rest = load_requests(write(name, text))
        assert [each.adapter for each in first.weighted] == [LocalPath(tmp_path / "one"), LocalPath(Path("/x/two"))]
        assert [each.weight for each in first.weighted] == [-0.5, 1.0]
        assert first.combination == Combination(type="ties_svd", density=0.5, svd_rank=4)
        assert str(first.destination) == "s3://b-c/one-two"
        assert [each.adapter_name for each in rest] == (["three"] if name == "batch.csv" else [])


def test_mistakes_in_a_file_stand_at_their_lines(refuse):
    text = """\
    defaults: {base: /b, destination: "/o/{id}"}
    requests:
      - id: one
        adapters:
          - {adapter: /a, wieght: 2}
          - adaptor: /b
          - 3
        combination:
          type: svd
          density: 0.5
      - id: two
        adapter: /a
        adapters: [{adapter: /a}]
        combination: {type: linear}
      - {id: three}
      - {id: four, adaptrs: [{adapter: /a}], combination: {type: linear}}
      - {id: five, adapters: [{adapter: /a}], combinatoin: {type: linear}}
      - {id: six, adapter: /a, combination: {type: linear}}
      - {id: seven, adapters: [{adapter: 'ftp://x'}], destination: "/o/{adapter}", combination: {type: linear}}
    """
    places, message = refuse("batch.yaml", text)
    assert places == [
        (5, "requests[0].adapters[0].wieght"),
        (6, "requests[0].adapters[1].adaptor"),
        (7, "requests[0].adapters[2]"),
        (10, "requests[0].combination.density"),
        (12, "requests[1].adapter"),
        (15, "requests[2].adapter"),
        (16, "requests[3].adaptrs"),
        (17, "requests[4].combinatoin"),
        (18, "requests[5].combination"),
        (19, "requests[6].adapters[0].adapter"),
    ]
    assert "did you mean 'weight'?" in message
    assert "expected an adapter, or adapters, found nothing" in message
    assert "expected adapters beside it, which it combines, found nothing" in message


def test_defaults_may_be_completed_by_requests(refuse):
    text = """\
    defaults: {base: /b, destination: "/o/{adapter}", combination: {type: ties}}
    requests:
      - {adapters: [{adapter: /a}, {adapter: /b}], combination: {density: 0.5}}
      - {adapters: [{adapter: /a}, {adapter: /c}]}
    """
    places, message = refuse("batch.yaml", text)
    assert places == [(1, "defaults.combination.density")]
    assert "which combination type 'ties' needs, found nothing" in message


def test_a_matrix_multiplies_single_adapters(refuse):
    text = "matrix:\n  bases: [/b]\n  adapters:\n    - {adapter: /a}\n  destination: /o\n"
    assert refuse("batch.yaml", text)[0] == [(4, "matrix.adapters[0]")]
