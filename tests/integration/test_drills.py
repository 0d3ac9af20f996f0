"""A merge that went wrong is not published, wherever it was headed, and the report says what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import build_llama, make_adapter
from tests.releases import left_in

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sources")
    base = build_llama(directory / "base", max_shard_size="100KB")
    return base, make_adapter(base, directory / "adapter", alpha=32, std=0.1)


def run_drill(drill, sources, destination, home, environment=()):
    base, adapter = sources
    command = [sys.executable, "-m", "tests.drills", drill, "merge", "--json"]
    command += ["--base", str(base), "--adapter", str(adapter), "--to", destination]
    variables = os.environ | dict(environment) | {"MERGEFLEET_HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    return done, json.loads(done.stdout)["merges"][0]


@pytest.mark.slow
@pytest.mark.parametrize("drill", ["flip-byte", "halve-scaling"])
def test_nothing_appears_in_a_directory(drill, sources, tmp_path):
    destination = tmp_path / "releases" / "merged"
    done, merge = run_drill(drill, sources, str(destination), tmp_path / "home")

    assert done.returncode == 3, done.stderr
    assert merge["failure"]["class"] == "parity_failed"
    assert list(destination.parent.iterdir()) == []
    assert left_in(tmp_path / "home" / "scratch") == []

    report = json.loads((Path(merge["report_path"]) / "parity.json").read_text())
    assert not report["passed"]
    wrong = [check for check in report["tensors"] if check["rounding_excess"] > 1]
    assert wrong
    assert all(check["max_abs_error"] > 0 for check in wrong)
    assert wrong[0]["tensor"] in " ".join(report["failures"])
    if drill == "flip-byte":
        assert [check["num_bad_elements"] for check in wrong] == [1]
    else:
        assert {check["tensor"] for check in wrong} == {c["tensor"] for c in report["tensors"] if c["changed"]}
    assert (Path(merge["report_path"]) / "parity.html").stat().st_size > 1000


@pytest.mark.s3
def test_nothing_appears_in_s3(sources, tmp_path, s3):
    done, merge = run_drill("flip-byte", sources, f"s3://{s3.bucket}/drill", tmp_path / "home", s3.environment())

    assert done.returncode == 3, done.stderr
    assert merge["failure"]["class"] == "parity_failed"
    client = s3.client()
    assert client.list_objects_v2(Bucket=s3.bucket, Prefix="drill").get("Contents", []) == []
    assert client.list_multipart_uploads(Bucket=s3.bucket, Prefix="drill").get("Uploads", []) == []
