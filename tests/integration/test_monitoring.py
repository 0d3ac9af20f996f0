"""Dashboard and alerts ask for what a driver exports: for what is on Ray's endpoint, not on a list."""

import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.ray_fleet.metrics import FleetMetrics
from jobs.errors import FailureClass
from tests.queries import EXPRESSIONS, selectors
from workers.merging.outcomes import Failure, JobOutcome, PublishOutcome, UnitOutcome, Usage

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def exported(ray_session):
    """Name to label to its values, of every metric that a driver registers, when all of them have happened."""
    metrics = FleetMetrics()
    registered = {f"ray_{each.info['name']}" for each in vars(metrics).values()}
    metrics.observe(jobs={}, num_waiting=0, num_in_flight=0, residents={"merge-worker-0": 1})
    passed = JobOutcome(job_id="one", merge_key="a" * 64)
    failed = JobOutcome(job_id="two", failure=Failure(failure_class=FailureClass.PARITY_FAILED, message="no"))
    usage = Usage(bytes_read=1, bytes_written=1, bytes_uploaded=1, seconds={"merge": 1.0})
    metrics.unit_finished(UnitOutcome(jobs=(passed, failed), usage=usage, residents=()))
    metrics.used(usage)
    metrics.publish_finished(PublishOutcome(job_id="one", seconds=1.0))
    metrics.settled("published")
    metrics.worker_lost()
    metrics.worker_benched()
    end = time.monotonic() + 60
    while (found := scrape(ray_session.metrics_urls[0])).keys() != registered:
        assert time.monotonic() < end, registered ^ found.keys()
        time.sleep(1)
    return found


def scrape(url):
    with urllib.request.urlopen(url, timeout=5) as response:
        text = response.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("ray_mergefleet_"):
                for label, value in sample.labels.items():
                    found.setdefault(sample.name, {}).setdefault(label, set()).add(value)
    return found


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_what_is_asked_for_is_exported(name, exported):
    """Metrics, labels, and the values of labels."""
    for selector, labels in selectors(EXPRESSIONS[name]):
        has = exported[selector.name]
        assert labels <= has.keys()
        for matcher in selector.matchers.matchers:
            assert set(matcher.value.split("|")) <= has[matcher.name]
