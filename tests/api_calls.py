"""Calls of every endpoint with inputs that Schemathesis makes of the OpenAPI document: valid, nearly valid, and none.

No answer may be a fault of the server, and each has to be what the document says: status, headers, type, shape. The
ledger behind it holds jobs in many states, so that questions about what is there are among them.
"""

import argparse
import collections
import contextlib
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.errors import Unsatisfiable
from schemathesis import checks
from schemathesis.generation import GenerationMode

from cluster.front.openapi import CHANGES_PATH, openapi_document
from cluster.settings import Settings
from jobs.errors import FailureClass
from jobs.ledger.pauses import Scope
from jobs.ledger.store import JobStore
from jobs.request import MergeRequest
from jobs.states import Decision, JobState
from tests.servers.front import FrontServer, serve_front

_NOT_HELD = [
    # What requests have to be goes beyond a schema: places, names that are taken, jobs that are there.
    checks.positive_data_acceptance,
    checks.ensure_resource_availability,
    # What is wrong by the type of a schema may be right as text: a YAML file, a number in an address.
    checks.negative_data_rejection,
]


def fill(store: JobStore) -> None:
    """Put jobs in some states into a ledger, some under names that Schemathesis likes to try."""
    names = ("0", "a", "job", "failed", "waiting", "cancelled")
    requests = [
        MergeRequest.model_validate(
            {"id": name, "base": "/b", "adapter": "/a", "destination": f"/out/{name}", "labels": {"a": "b"}}
        )
        for name in names
    ]
    store.submit(requests, "0")
    store.register_driver("0", "host", 1, "")
    lease, *_ = store.claim("0", 2, 3600)
    store.fail(lease.job_id, lease.token, FailureClass.AUTH, "no\x07 é", Decision(state=JobState.FAILED))
    store.cancel(["cancelled"])
    store.pause(Scope.PLACE, "hf://", "me", "why")


def call_all(server: FrontServer, num_calls: int, seed: int) -> collections.Counter[tuple[str, int]]:
    """Call every endpoint of a server about so many times in all.

    Args:
        server: is called.
        num_calls: how many, half of them with inputs that the document does not allow.
        seed: of the inputs.

    Returns:
        How often each endpoint answered with each status.

    Raises:
        BaseException: an answer is a fault, or not what the document says.
    """
    schema = schemathesis.openapi.from_dict(openapi_document("0"))
    operations = [each.ok() for each in schema.exclude(path=CHANGES_PATH).get_all_operations()]  # one that never ends
    found: collections.Counter[tuple[str, int]] = collections.Counter()
    headers = {"Authorization": f"Bearer {server.token}"}
    each_time = max(1, num_calls // (2 * len(operations)))
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            inputs = operation.as_strategy(generation_mode=mode)

            @seeded(seed)
            @settings(
                max_examples=each_time,
                deadline=None,
                database=None,
                derandomize=False,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=inputs)
            def call(case: schemathesis.Case) -> None:
                response = case.call(base_url=server.url, headers=headers, timeout=60)
                found[f"{case.method} {case.path}", response.status_code] += 1
                case.validate_response(response, excluded_checks=_NOT_HELD)

            try:
                call()
            except Unsatisfiable:  # nothing can be wrong where nothing can be said
                assert mode is GenerationMode.NEGATIVE
                assert "parameters" not in operation.definition.raw or not operation.definition.raw["parameters"]
    return found


@contextlib.contextmanager
def serve_filled(directory: Path) -> Iterator[FrontServer]:
    """Run a server over a ledger with some jobs."""
    with serve_front(Settings(home=directory, allowed_destinations=("/out", "s3://out"))) as server:
        fill(server.store)
        yield server


def main() -> None:
    """Call the API, and print how often each endpoint answered with what."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--calls", type=int, default=5000, help="at least")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    with tempfile.TemporaryDirectory() as directory, serve_filled(Path(directory)) as server:
        begin = time.monotonic()
        found: collections.Counter[tuple[str, int]] = collections.Counter()
        rounds = itertools.count(arguments.seed)
        while (left := arguments.calls - found.total()) > 0:  # endpoints with few inputs end early
            found += call_all(server, left, next(rounds))
    for (name, status), count in sorted(found.items()):
        print(f"{count:6}  {status}  {name}")
    print(f"{found.total()} calls in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
