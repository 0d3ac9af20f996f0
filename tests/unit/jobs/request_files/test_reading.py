"""Request files in YAML, JSON lines and CSV: the same requests from each."""

import contextlib
import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.locations import LocalPath, S3Prefix
from jobs.request import BaseQuantization
from jobs.request_files import documents, matrix, reading
from jobs.request_files.problems import RequestFileError
from jobs.request_files.reading import load_requests

yaml_like = st.text(st.sampled_from("ab:{}[]&*!#-?|>'\",\n \t%~<.0123"), max_size=60)


file_like = st.sampled_from(
    ["requests:", "matrix:", "defaults:", "  - ", "id", "base: b", "bases: [a]", "\n", "&a", "*a"]
)


@given(
    st.sampled_from([".yaml", ".jsonl", ".csv"]),
    st.binary(max_size=60) | yaml_like.map(str.encode) | st.lists(file_like).map(lambda parts: "".join(parts).encode()),
)
def test_any_file_loads_or_is_refused(tmp_path_factory, suffix, content):
    path = tmp_path_factory.mktemp("fuzz") / f"batch{suffix}"
    path.write_bytes(content)
    with contextlib.suppress(RequestFileError):
        assert load_requests(path)


def test_yaml_defaults_matrix_and_templates(write, tmp_path):
    path = write(
        "batch.yaml",
        """\
        schema: 1
        defaults:
          base: hf://org/llama@abc
          destination: s3://releases/{base}/{id}
          labels: {team: a, tier: one}
          parity: {thresholds: {max_mean_kl: 1e-3}}
          max_shard_size: 5GB
        requests:
          - id: plain
            adapter: adapters/plain
            labels: {tier: two}
            parity: {level: arithmetic}
            max_shard_size: null
          - {id: "x-{adapter}", adapter: adapters/b, destination: "out/{id}-{{1}}"}
        matrix:
          bases: [hf://org/llama, models/tiny]
          adapters: [adapters/one, s3://bucket/two]
          quantizations: [none, nf4]
          id: "{base}-{adapter}-{quantization}"
          priority: 7
        """,
    )
    requests = load_requests(path)
    plain, templated, *product = requests
    assert plain.base.revision == "abc"
    assert plain.adapter == LocalPath(tmp_path / "adapters/plain")
    assert plain.destination == S3Prefix("releases", "llama/plain")
    assert plain.labels == {"team": "a", "tier": "two"}
    assert plain.parity.level == "arithmetic"
    assert plain.parity.thresholds.max_mean_kl == 1e-3
    assert plain.max_shard_size is None
    assert templated.id == "x-b"
    assert templated.destination == LocalPath(tmp_path / "out/x-b-{1}")
    assert [request.id for request in product] == [
        f"{base}-{adapter}-{quantization}"
        for base in ("llama", "tiny")
        for adapter in ("one", "two")
        for quantization in ("none", "nf4")
    ]
    assert {str(request.destination) for request in product if request.base.name == "tiny"} == {
        f"s3://releases/tiny/tiny-{adapter}-{quantization}"
        for adapter in ("one", "two")
        for quantization in ("none", "nf4")
    }
    assert {request.priority for request in product} == {7}
    assert product[0].base_quantization is BaseQuantization.NONE
    assert product[0].max_shard_size == 5_000_000_000


def test_several_matrices_may_have_options_of_their_own(write):
    path = write(
        "batch.yml",
        """\
        defaults: {destination: "s3://bkt/{adapter}-{quantization}"}
        matrix:
          - bases: [/m/a]
            adapters: [/x, /y]
            quantizations: [nf4]
            quantization_options: {bnb_4bit_use_double_quant: true}
          - {bases: [/m/a], adapters: [/x, /y], base_quantization: none}
        """,
    )
    requests = load_requests(path)
    assert [request.quantization_options.bnb_4bit_use_double_quant for request in requests] == [
        True,
        True,
        False,
        False,
    ]
    assert [str(request.destination) for request in requests] == [
        "s3://bkt/x-nf4",
        "s3://bkt/y-nf4",
        "s3://bkt/x-none",
        "s3://bkt/y-none",
    ]


def test_jsonl(write, tmp_path):
    lines = [
        "# a comment",
        json.dumps({"id": "a", "base": "b", "adapter": "/x", "destination": "o/{id}", "priority": 3}),
        "  ",
        json.dumps({"schema": 1, "base": "b", "adapter": "/x", "destination": "p", "parity": {"prompts": ["é"]}}),
    ]
    one, two = load_requests(write("batch.jsonl", "\r\n".join(lines)))
    assert (one.id, one.priority, one.destination) == ("a", 3, LocalPath(tmp_path / "o/a"))
    assert two.id.startswith("merge-")
    assert two.parity.prompts == ("é",)


def test_csv(write, tmp_path):
    path = write(
        "batch.csv",
        """\
        \ufeffid,base,adapter,destination,base_quantization,max_shard_size,parity.level,parity.prompts,parity.thresholds.max_mean_kl,labels.team,labels.a.b,quantization_options.bnb_4bit_use_double_quant,priority
        one, b ,/x,o/{id},fp4,5GB,arithmetic,"[""p"", ""q
        r""]",1e-3,red,x,true,-3

        two,b,/x,o/{id},none,,,,,,,,
        """,
    )
    one, two = load_requests(path)
    assert one.base == LocalPath(tmp_path / "b")
    assert one.base_quantization is BaseQuantization.FP4
    assert one.max_shard_size == 5_000_000_000
    assert one.parity.level == "arithmetic"
    assert one.parity.prompts == ("p", "q\nr")
    assert one.parity.thresholds.max_mean_kl == 1e-3
    assert one.labels == {"team": "red", "a.b": "x"}
    assert one.quantization_options.bnb_4bit_use_double_quant
    assert one.priority == -3
    assert two.base_quantization is BaseQuantization.NONE
    assert two.labels == {}


def test_yaml_reads_the_core_schema(write):
    path = write(
        "batch.yaml",
        """\
        requests:
          - base: /b
            adapter: /a
            destination: /o
            priority: 0o17
            parity: {thresholds: {max_mean_kl: 1e-3, max_rounding_excess: .5, min_top1_agreement: 1}}
            labels: {country: no, switch: on, date: 2024-01-01, time: 12:30:00, empty: "", quoted: "7"}
        """,
    )
    (request,) = load_requests(path)
    assert request.priority == 15
    assert request.labels == {
        "country": "no",
        "switch": "on",
        "date": "2024-01-01",
        "time": "12:30:00",
        "empty": "",
        "quoted": "7",
    }


def test_files_that_cannot_be_read(refuse, tmp_path):
    with pytest.raises(RequestFileError, match="found No such file or directory"):
        load_requests(tmp_path / "no.yaml")
    (tmp_path / "directory.yaml").mkdir()
    with pytest.raises(RequestFileError, match="expected a regular file"):
        load_requests(tmp_path / "directory.yaml")
    assert refuse("batch.txt", "requests: []")[0] == [(None, "")]
    places, message = refuse("batch.yaml", b"requests:\n  - id: \xff\n")
    assert places == [(2, "")]
    assert "0xff" in message


def test_files_beyond_the_limits(refuse, monkeypatch):
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    monkeypatch.setattr(documents, "MAX_VALUES", 100_000)
    _, message = refuse("bomb.yaml", bomb)
    assert "aliases followed" in message
    for name in ("deep.yaml", "deep.jsonl"):
        nested = '{"a": ' * 60 + "1" + "}" * 60
        assert "nested at most" in refuse(name, nested)[1]
    assert "JSON object of reasonable values" in refuse("deepest.jsonl", "[" * 200_000)[1]
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 10)
    assert "at most 10 bytes" in refuse("batch.yaml", "requests: []")[1]
    monkeypatch.undo()
    monkeypatch.setattr(documents, "MAX_VALUES", 5)
    row = "id,base,adapter,destination\n" + "a,b,c,d\n" * 2
    assert "at most 5 values" in refuse("batch.csv", row)[1]
    monkeypatch.undo()
    monkeypatch.setattr(reading, "MAX_REQUESTS", 1)
    monkeypatch.setattr(matrix, "MAX_REQUESTS", 1)
    assert "at most 1 requests in one file, found 2" in refuse("batch.csv", row)[1]
    text = "matrix: {bases: [/b, /c], adapters: [/x], destination: '/o/{base}'}\n"
    assert "at most 1 requests in one file, found 2" in refuse("batch.yaml", text)[1]


def test_thousands_of_requests_load_in_seconds(write):
    lines = [
        f"  - {{id: r{i}, adapter: a/{i}, labels: {{n: 'x{i}'}}, parity: {{level: arithmetic}}}}\n" for i in range(5000)
    ]
    path = write("batch.yaml", "defaults: {base: /b, destination: 's3://bkt/{id}'}\nrequests:\n" + "".join(lines))
    start = time.monotonic()
    assert len(load_requests(path)) == 5000
    assert time.monotonic() - start < 20


def test_a_file_of_mistakes_is_not_read_to_its_end(refuse):
    rows = '{"base": 7, "adapter": "/a", "destination": "/r"}\n' * 3000
    problems, text = refuse("many.jsonl", rows)
    assert len(problems) == 1002
    num_read = 3000 - int(re.search(r"more; the last (\d+) requests were not looked at", text)[1])
    assert num_read <= 1001
