"""Patterns among the adapters of a matrix: what they stand for, in which order, and what is told of the rest."""

import glob
import itertools
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from jobs.allowance import Allowance, Pattern
from jobs.errors import InvalidValueError
from jobs.locations import Elsewhere, HubRepo, LocalPath, S3Prefix
from jobs.request_files import patterns
from jobs.request_files.local_folders import LocalFolders
from jobs.request_files.problems import RequestFileError
from jobs.request_files.reading import Origin, has_patterns, read_requests
from jobs.steps import in_order, step_of
from tests.releases import write_files

WEIGHTS = save({"w": torch.zeros(7), "v": torch.zeros(3)})
"""As safetensors writes them."""
ADAPTER = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": WEIGHTS}
MATRIX = """\
matrix:
  bases: [/b]
  adapters: {adapters}
  destination: /out/{{adapter}}-{{step}}
"""


def lay(root: Path, *folders: str, files: dict[str, bytes] = ADAPTER) -> None:
    for folder in folders:
        write_files(root / folder, files)


def read(root: Path, text: str, allowance: Allowance = Allowance()):  # noqa: B008 - frozen
    return read_requests(text, Origin("f.yaml", ".yaml", root), allowance, LocalFolders())


def refusals(root: Path, text: str, allowance: Allowance = Allowance()):  # noqa: B008 - frozen
    with pytest.raises(RequestFileError) as caught:
        read(root, text, allowance)
    return [(problem.line, problem.field, problem.expected, problem.found) for problem in caught.value.problems]


def places(reading, root: Path) -> list[str]:
    return [str(request.adapter.path.relative_to(root)) for request in reading.requests]


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_model.pt", "adapter_0.pt", "adapter_model.bin"])
def test_adapters_of_other_trainers_are_found_too(name, tmp_path):
    """Whatever a single request takes as an adapter (docs/adapters.md), a pattern stands for."""
    files = {"adapter_config.json": b"{}", name: WEIGHTS if name.endswith(".safetensors") else b"PK"}
    lay(tmp_path / "runs", "epoch_0", "epoch_1", files=files)
    reading = read(tmp_path, MATRIX.format(adapters="runs/epoch_*"))
    assert places(reading, tmp_path) == ["runs/epoch_0", "runs/epoch_1"]
    lay(tmp_path / "cut", "epoch_2", files={"adapter_config.json": b"{}", "adapters.safetensors": WEIGHTS[:-1]})
    assert "whose header speaks of" in refusals(tmp_path, MATRIX.format(adapters="cut/epoch_*"))[0][3]


def test_a_pattern_stands_for_checkpoints_in_the_order_of_their_steps(tmp_path):
    lay(tmp_path / "runs" / "x", *(f"checkpoint-{step}" for step in (1500, 100, 900, 20000)))
    lay(tmp_path / "runs" / "x", "best", ".checkpoint-7")
    (tmp_path / "runs" / "x" / "checkpoint-5").write_text("a file")
    reading = read(tmp_path, MATRIX.format(adapters="runs/x/checkpoint-*"))
    steps = (100, 900, 1500, 20000)
    assert places(reading, tmp_path) == [f"runs/x/checkpoint-{step}" for step in steps]
    assert [str(request.destination) for request in reading.requests] == [
        f"/out/checkpoint-{step}-{step}" for step in steps
    ]
    assert reading.left_out == ()


def test_patterns_and_places_stand_side_by_side_and_multiply(tmp_path):
    lay(tmp_path, "a/checkpoint-1", "a/checkpoint-2", "b-3")
    text = """\
    matrix:
      bases: [/b, /c]
      adapters: ['a/checkpoint-?', b-3]
      quantizations: [none]
      destination: /out/{base}/{step}-{quantization}
      labels: {step: "{step}", of: "{{{base}}}", run: r}
    """
    reading = read(tmp_path, text)
    assert [(str(request.destination), request.labels) for request in reading.requests] == [
        (f"/out/{base}/{step}-none", {"step": step, "of": f"{{{base}}}", "run": "r"})
        for base, step in itertools.product("bc", "123")
    ]


def test_a_new_checkpoint_adds_one_request_and_changes_no_other(tmp_path):
    lay(tmp_path, "checkpoint-1", "checkpoint-3")
    before = {request.id for request in read(tmp_path, MATRIX.format(adapters="checkpoint-*")).requests}
    lay(tmp_path, "checkpoint-2")
    after = {request.id for request in read(tmp_path, MATRIX.format(adapters="checkpoint-*")).requests}
    assert before < after
    assert len(after - before) == 1


def test_a_step_is_that_of_the_last_wildcard_with_a_number(tmp_path):
    lay(tmp_path, "run-1/checkpoint-5/policy", "run-1/checkpoint-60/policy", "run-2/checkpoint-5/policy")
    text = MATRIX.format(adapters="run-*/checkpoint-*/policy").replace("/out/", "/out/{base}/")
    with pytest.raises(RequestFileError, match="a different destination for each request"):
        read(tmp_path, text)
    reading = read(tmp_path, text.replace("run-*", "run-1"))
    assert [request.destination.name for request in reading.requests] == ["policy-5", "policy-60"]


def test_what_is_still_being_written_is_left_out_and_told(tmp_path):
    lay(tmp_path, "checkpoint-1", "tmp-checkpoint-2")
    cut = WEIGHTS[:-1]
    odd = {
        "checkpoint-3": {"trainer_state.json": b"{}"},
        "checkpoint-4": {"adapter_config.json": b"{}"},
        "checkpoint-5": ADAPTER | {"adapter_model.safetensors": cut},
        "checkpoint-6": ADAPTER | {"adapter_model.safetensors": WEIGHTS[:11]},
        "checkpoint-7": ADAPTER | {"adapter_model.safetensors": b""},
        "checkpoint-8": ADAPTER | {"adapter_config.json": b'{"peft_type": '},
        "checkpoint-9": {"adapter_config.json": b"{}", "adapter_model-00002-of-00002.safetensors": WEIGHTS},
        "checkpoint-10": ADAPTER | {"adapter_model.safetensors": WEIGHTS + b"!"},
        "checkpoint-11": ADAPTER,
        "checkpoint-12": ADAPTER | {"adapter_model.safetensors": struct.pack("<Q", 2) + b"[]"},
    }
    for folder, files in odd.items():
        write_files(tmp_path / folder, files)
    with (tmp_path / "checkpoint-11" / "adapter_config.json").open("ab") as file:
        file.truncate(1 << 40)  # a sparse TiB is not read
    reading = read(tmp_path, MATRIX.format(adapters="checkpoint-*"))
    assert places(reading, tmp_path) == ["checkpoint-1"]
    size = len(WEIGHTS)
    assert [each.removeprefix(f"{tmp_path}/") for each in reading.left_out] == [
        "checkpoint-3: has no adapter_config.json",
        "checkpoint-4: has an adapter_config.json and no weights",
        f"checkpoint-5: has {size - 1} bytes of adapter_model.safetensors, whose header speaks of {size}",
        "checkpoint-6: has 11 bytes of adapter_model.safetensors, and no whole header in them",
        "checkpoint-7: has 0 bytes of adapter_model.safetensors, and no whole header in them",
        "checkpoint-8: has an adapter_config.json that is no JSON object",
        "checkpoint-9: has no adapter_model-00001-of-00002.safetensors",
        f"checkpoint-10: has {size + 1} bytes of adapter_model.safetensors, whose header speaks of {size}",
        f"checkpoint-11: has an adapter_config.json of {1 << 40} bytes, more than {16 << 20}",
        "checkpoint-12: has 10 bytes of adapter_model.safetensors, and no whole header in them",
        "tmp-checkpoint-2: has the name of what is still being written",
    ]
    reading = read(tmp_path, MATRIX.format(adapters="'*-?'"))
    assert places(reading, tmp_path) == ["checkpoint-1"]


def test_pickled_adapters_and_long_headers_are_whole(tmp_path):
    lay(tmp_path, "checkpoint-1", files={"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"})
    many = save({f"layers.{number}.{'x' * 60}": torch.zeros(1) for number in range(2000)})
    assert struct.unpack("<Q", many[:8])[0] > 100_000
    lay(tmp_path, "checkpoint-2", files=ADAPTER | {"adapter_model.safetensors": many})
    assert len(read(tmp_path, MATRIX.format(adapters="checkpoint-*")).requests) == 2


def test_every_mistake_is_told_at_once_with_its_line(tmp_path):
    lay(tmp_path, "good/checkpoint-1", "named/checkpoint-1/policy", "named/checkpoint-1/critic", "best/one", "best/two")
    (tmp_path / "empty" / "checkpoint-1").mkdir(parents=True)
    text = """\
matrix:
  - bases: [/b]
    adapters:
      - missing/checkpoint-*
      - empty/checkpoint-*
      - good/nothing-*
      - named/checkpoint-*
      - named/checkpoint-*/actor
      - s3://bucket/*
      - hf://org/*
      - good/**/x
      - s3://bucket/run/checkpoint-*
    destination: /out/{step}
  - bases: [/b]
    adapters: best/*
    destination: /out/best/{step}
    labels: {step: "{step}", other: "{steps}"}
"""
    at = {line: (expected, found) for line, _, expected, found in refusals(tmp_path, text)}
    assert sorted(at) == [4, 5, 6, 7, 8, 9, 10, 11, 12, 16, 17]
    assert at[4] == (
        "a pattern of places that can be looked into",
        f"{tmp_path}/missing: there is no such directory",
    )
    assert at[5] == (
        "at least one folder that matches 'empty/checkpoint-*' and holds an adapter",
        f"none: {tmp_path}/empty/checkpoint-1: has no adapter_config.json",
    )
    assert at[6][1] == f"none: nothing in {tmp_path}/good matches"
    expected, found = at[7]
    assert expected == "an adapter at the top of each folder that matches"
    assert found.startswith(f"'{tmp_path}/named/checkpoint-1' with adapters in its folders critic, policy; ")
    assert found.endswith("write 'named/checkpoint-*/critic' for one of them")
    assert at[8][1] == f"none: {tmp_path}/named/checkpoint-1/actor: is not there"
    assert at[9] == ("a bucket and a prefix before the first wildcard", "'s3://bucket/*'")
    assert at[10] == ("a repository with its owner before the first wildcard", "'hf://org/*'")
    assert at[11] == ("names of folders from the first wildcard on, none of them '**'", "'good/**/x'")
    assert "stores are not looked into from here" in at[12][1]
    assert at[16] == ("one adapter, in a folder whose name ends in a number, where {step} is used", "'one'")
    assert at[17][0].startswith(("one adapter, in a folder", "no placeholders but {base}, {adapter}, {step}"))


def test_patterns_are_looked_up_in_allowed_places_alone(tmp_path):
    lay(tmp_path, "team/checkpoint-1", "secret/checkpoint-1")
    allowance = Allowance(sources=(Pattern.parse("/b"), Pattern.parse(f"{tmp_path}/team")))
    assert len(read(tmp_path, MATRIX.format(adapters="team/checkpoint-*"), allowance).requests) == 1
    ((line, field, expected, found),) = refusals(tmp_path, MATRIX.format(adapters="secret/checkpoint-*"), allowance)
    assert (line, field) == (3, "matrix.adapters")
    assert expected == f"a pattern below a source that this fleet reads: /b, {tmp_path}/team"
    assert found == f"'{tmp_path}/secret' before the first wildcard"
    assert refusals(tmp_path, MATRIX.format(adapters="'*/checkpoint-*'"), allowance)[0][3] == (
        f"'{tmp_path}' before the first wildcard"
    )


@pytest.mark.parametrize("directory", [Path("/"), Elsewhere(None), Elsewhere(Path("/"))])
def test_without_a_listing_patterns_are_refused_and_nothing_is_looked_at(tmp_path, directory):
    lay(tmp_path, "checkpoint-1")
    for root in (tmp_path, "/nowhere"):  # the same words, whether there is something or not
        with pytest.raises(RequestFileError) as caught:
            read_requests(MATRIX.format(adapters=f"['{root}/checkpoint-*']"), Origin("f.yaml", ".yaml", directory))
        (problem,) = caught.value.problems
        assert (problem.line, problem.field) == (3, "matrix.adapters[0]")
        assert problem.expected == (
            "a place without '*' and '?': they are looked up by `mergefleet submit`, where the file is"
        )
        assert problem.found == f"'{root}/checkpoint-*'"


def test_wildcards_elsewhere_are_no_patterns(tmp_path):
    text = """\
    defaults:
      parity: {prompts: ["What is 2 * 3?"]}
      labels: {note: "{x} *"}
    requests:
      - {base: '/b?', adapter: '/a*', destination: '/out/*'}
    """
    origin = Origin("f.yaml", ".yaml", tmp_path)
    (request,) = read(tmp_path, text).requests
    assert (str(request.adapter), request.labels) == ("/a*", {"note": "{x} *"})
    assert not has_patterns(text, origin)
    assert has_patterns(MATRIX.format(adapters="checkpoint-*"), origin)
    assert has_patterns(MATRIX.format(adapters="[/a, 'x/?']"), origin)
    assert not has_patterns(MATRIX.format(adapters="[/a]"), origin)
    assert not has_patterns("{ no yaml: *", origin)


def test_a_step_stands_in_requests_of_every_format(tmp_path):
    line = {"base": "/b", "adapter": "/runs/checkpoint-00070", "destination": "/out/{step}", "id": "s-{step}"}
    (request,) = read_requests(json.dumps(line), Origin("f.jsonl", ".jsonl", tmp_path)).requests
    assert (request.id, str(request.destination)) == ("s-70", "/out/70")
    with pytest.raises(RequestFileError, match="in a folder whose name ends in a number"):
        read_requests(json.dumps(line | {"adapter": "/runs/best"}), Origin("f.jsonl", ".jsonl", tmp_path))


@pytest.mark.parametrize(
    ("text", "root", "names"),
    [
        ("/runs/*", LocalPath(Path("/runs")), ("*",)),
        ("/*/x", LocalPath(Path("/")), ("*", "x")),
        ("*-1", LocalPath(Path("/here")), ("*-1",)),
        ("../x/c-?/", LocalPath(Path("/x")), ("c-?",)),
        ("s3://bucket/run/*/a", S3Prefix("bucket", "run"), ("*", "a")),
        ("hf://org/name/c-*", HubRepo("org/name"), ("c-*",)),
        ("hf://org/name/sub/c-*@v/1", HubRepo("org/name", "v/1", "sub"), ("c-*",)),
    ],
)
def test_a_pattern_has_a_root_and_names(text, root, names):
    found = patterns.FolderPattern.parse(text, Path("/here"))
    assert (found.root, found.names) == (root, names)


@pytest.mark.parametrize(
    "text", ["s3://*", "s3://bucket/*", "hf://org/*", "hf://org/name@v*", "/a/*/../b", "/a/*//b", "/a/**"]
)
def test_what_is_no_pattern_of_places(text):
    with pytest.raises(InvalidValueError):
        patterns.FolderPattern.parse(text, Path("/here"))


_names = st.text(st.sampled_from("ab-.1[]{}^$+ "), min_size=1, max_size=5).filter(lambda name: name not in (".", ".."))
_parts = st.text(st.sampled_from("ab-.1[]*?"), min_size=1, max_size=5).filter(
    lambda name: "**" not in name and name not in (".", "..")
)


@given(st.lists(st.tuples(_names, _names), min_size=1, max_size=6), _parts, _parts)
def test_patterns_match_as_the_shell_does(tmp_path_factory, folders, first, second):
    """Against `glob` of the standard library, which knows brackets besides: they are escaped for it."""
    root = tmp_path_factory.mktemp("tree")
    for outer, inner in folders:
        (root / outer / inner).mkdir(parents=True, exist_ok=True)
    text = f"{root}/{first}/{second}"
    if not any(map(patterns.is_pattern, (first, second))) or not (
        patterns.is_pattern(first) or (root / first).is_dir()
    ):
        return
    expected = glob.glob(text.replace("[", "[[]"))  # noqa: PTH207 - the reference
    found = patterns.FolderPattern.parse(text, root).matches(LocalFolders(), [])
    # A last name without wildcards is not looked up here: whether it is there is seen with its files.
    assert sorted(str(match.place) for match in found if match.place.path.is_dir()) == sorted(expected)


@given(st.lists(st.integers(0, 10**30), min_size=1, unique=True), st.text(st.sampled_from("ab-"), min_size=1))
def test_names_are_sorted_by_their_numbers(steps, stem):
    names = [f"{stem}{step}" for step in steps]
    assert sorted(names, key=in_order) == [f"{stem}{step}" for step in sorted(steps)]
    assert [step_of(name) for name in names] == steps
