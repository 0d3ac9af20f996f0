"""Every mistake of a request file, told at once, with its line and what to do."""

import json

import pytest

TEN_MISTAKES = """\
# a batch with ten mistakes
defaults:
  base: /models/llama
  destination: s3://releases/{id}
  dtype: int8
requests:
  - id: one
    adapter: ftp://nowhere/x
  - id: two
    adaptor: adapters/two
  - id: three
    adapter: adapters/three
    base_quantization: nf5

  - id: one
    adapter: adapters/four
    parity:
      thresholds:
        max_mean_kl: -1
  - id: five
    adapter: adapters/five
    max_shard_size: 5 XB
    labels: {team: 7}
  - id: six
    adapter: adapters/six
    destination: s3://releases/{nme}
  - id: seven
    id: eight
    adapter: adapters/seven
"""


def test_ten_different_mistakes_are_reported_at_once_with_their_lines(refuse):
    places, message = refuse("batch.yaml", TEN_MISTAKES)
    assert places == [
        (5, "defaults.dtype"),
        (8, "requests[0].adapter"),
        (10, "requests[1].adaptor"),
        (13, "requests[2].base_quantization"),
        (15, "requests[3].id"),
        (19, "requests[3].parity.thresholds.max_mean_kl"),
        (22, "requests[4].max_shard_size"),
        (23, "requests[4].labels.team"),
        (26, "requests[5].destination"),
        (28, "requests[6].id"),
    ]
    assert (
        "batch.yaml:10: requests[1].adaptor: expected a known field (did you mean 'adapter'?), found 'adaptor'"
        in message
    )
    words = "expected 'default', 'none', 'nf4', 'fp4' or 'stored', found 'nf5'"
    assert f"batch.yaml:13: requests[2].base_quantization: {words}" in message
    assert "found 'one' again, first on line 7" in message


def test_csv_mistakes(refuse):
    places, message = refuse(
        "batch.csv",
        """\
        id,base,adapter,destination,parity.levle,nope,id,priority,parity.prompts
        "two
        lines",b,/x,o/a,,,,1,
        b,b,/x,o/b,,,,x,no list
        c,b,/x,o/c,,,,
        """,
    )
    assert places == [
        (1, "parity.levle"),
        (1, "nope"),
        (1, "id"),
        (2, "id"),
        (4, "parity.prompts"),
        (4, "priority"),
        (5, ""),
    ]
    assert "did you mean 'parity.level'?" in message


def test_csv_without_a_needed_column_says_so_once(refuse):
    places, _ = refuse("batch.csv", "id,base,adapter\na,b,/x\nc,b,/x\n")
    assert places == [(1, "destination")]


def test_csv_with_a_broken_quote(refuse):
    places, _ = refuse("batch.csv", 'id,base,adapter,destination\na,b,/x,o/a\nb,b,/x,"o/b\n')
    assert places == [(3, "")]


def test_jsonl_mistakes(refuse):
    good = '{"id": "%s", "base": "/b", "adapter": "/a", "destination": "/o/%s"}'
    places, message = refuse(
        "batch.jsonl",
        "\n".join(
            [
                good % ("a", "a"),
                "{",
                "[1]",
                '{"id": "b", "id": "c", "base": "/b", "adapter": "/a", "destination": "/o/b"}',
                good % ("d", "a"),
                '{"base": "/b", "adapter": "/a", "destination": "/o/\\ud800"}',
                '{"base": "/b", "adapter": "/a", "destination": "/o/n", "priority": %s}' % ("9" * 5000),
                '{"base": "/b", "adapter": "/a", "destination": "/o/p", "priority": "3"}',
                '{"base": "/b", "adapter": "/a", "destination": "/o/q", "parity": {"levl": "full"}}',
            ]
        ),
    )
    assert places == [
        (2, ""),
        (3, ""),
        (4, "id"),
        (5, "destination"),
        (6, ""),
        (7, ""),
        (8, "priority"),
        (9, "parity.levl"),
    ]
    assert "column 2" in message
    assert "found '/o/a' again, first on line 1" in message


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("", [(None, "")]),
        ("# nothing\n", [(None, "")]),
        ("requests: []\n", [(None, "")]),
        ("requests:\n", [(None, "")]),
        ("defaults: {priority: 1}\n", [(None, "")]),
        ("- id: a\n", [(1, "")]),
        ("\nrequest:\n  - id: a\n", [(2, "request")]),
        ("requests:\n  - just text\n", [(2, "requests[0]")]),
        ("requests: {id: a}\n", [(1, "requests")]),
        ("schema: 2\nrequests: []\n", [(1, "schema")]),
        ("schema: true\nrequests: []\n", [(1, "schema")]),
        ("defaults: []\nrequests: []\n", [(1, "defaults")]),
        ("matrix: text\n", [(1, "matrix")]),
        ("requests:\n  - id: [1\n", [(3, "")]),
        ("requests:\n\t- id: 1\n", [(2, "")]),
        ("requests: *unknown\n", [(1, "")]),
        ("requests: []\n---\nrequests: []\n", [(2, "")]),
        ("requests:\n  - id: 'a\x07'\n", [(2, "")]),
        ("requests: &all\n  - *all\n", [(1, "requests[0]"), (1, "requests[0]")]),
        ("requests: []\nrequests: []\n", [(2, "requests")]),
        ("requests: []\n3: x\n", [(2, "")]),
        ("requests: []\n? [a]\n: x\n", [(2, "")]),
        ("defaults: &d\n  priority: 1\nrequests:\n  - <<: *d\n", None),
        ("requests: !!python/object:os.system []\n", [(1, "requests")]),
        ("defaults: {id: !secret x}\n", [(1, "defaults.id")]),
        ("defaults: {priority: !!int x}\n", [(1, "defaults.priority")]),
        ("[" * 100_000, [(None, "")]),
    ],
)
def test_yaml_that_is_no_request_file(refuse, text, places):
    found, _ = refuse("batch.yaml", text)
    if places is None:
        assert (4, "requests[0].<<") in found
    else:
        assert found == places


def test_lines_are_those_of_an_editor(refuse):
    """YAML also counts U+2028 and U+0085 inside text as line breaks; editors do not."""
    text = 'defaults:\r\n  labels: {a: "x\u2028y\u0085z"}\r\nrequests:\r\n  - dtype: int8\r\n'
    places, _ = refuse("batch.yaml", text.encode())
    assert (4, "requests[0].dtype") in places


def test_mistakes_of_the_defaults_are_reported_once_and_also_when_no_request_uses_them(refuse):
    requests = "".join(f"  - {{id: r{i}, base: /b, adapter: /a, dtype: float16}}\n" for i in range(50))
    text = "defaults:\n  dtype: int8\n  priority: x\n  bse: /b\n  destination: /o/{nope}\nrequests:\n" + requests
    places, _ = refuse("batch.yaml", text)
    assert places == [(2, "defaults.dtype"), (3, "defaults.priority"), (4, "defaults.bse"), (5, "defaults.destination")]


def test_the_same_request_twice_is_a_mistake(refuse):
    request = "  - {base: /b, adapter: /a, destination: /o}\n"
    places, message = refuse("batch.yaml", f"requests:\n{request}{request}")
    assert places == [(3, "requests[1].destination")]
    assert "first on line 2" in message


def test_destinations_are_compared_as_places_not_as_text(refuse, tmp_path):
    one, two = ({"base": "/b", "adapter": "/a", "destination": text} for text in ("o/../p", str(tmp_path / "p")))
    places, _ = refuse("batch.jsonl", f"{json.dumps(one)}\n{json.dumps(two)}\n")
    assert places == [(2, "destination")]


def test_clashes_are_found_between_requests_that_have_other_mistakes(refuse):
    request = "  - {id: a, base: /b, adapter: /a, destination: /o, dtype: int8}\n"
    places, _ = refuse("batch.yaml", f"requests:\n{request}{request}")
    assert places == [
        (2, "requests[0].dtype"),
        (3, "requests[1].id"),
        (3, "requests[1].destination"),
        (3, "requests[1].dtype"),
    ]


def test_a_broken_base_is_one_mistake_not_two(refuse):
    places, _ = refuse(
        "batch.yaml", "requests:\n  - base: ftp://x\n    adapter: /a\n    destination: hf://org/{base}\n"
    )
    assert places == [(2, "requests[0].base")]


def test_destinations_inside_of_others_are_refused_with_both_lines(refuse):
    lines = [
        json.dumps({"base": "/b", "adapter": "/a", "destination": place})
        for place in (
            "s3://bkt/n",
            "s3://bkt/n/prod",
            "s3://bkt/n-other",
            "/o/x/y",
            "/o",
            "/o2",
            "hf://o/n",
            "hf://o/n@v1",
        )
    ]
    places, found = refuse("batch.jsonl", "\n".join(lines) + "\n")
    assert places == [(2, "destination"), (5, "destination")]
    assert "'s3://bkt/n/prod', inside of 's3://bkt/n' on line 1" in found
    assert "'/o', around '/o/x/y' on line 4" in found
