"""Dashboard and alerts ask for what a driver exports: the names and labels on Ray's endpoint, not a list of them."""

import json
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cluster.ray_fleet.metrics import FleetMetrics
from jobs.errors import FailureClass
from jobs.states import FINAL_STATES, JobState
from workers.merging.outcomes import Failure, JobOutcome, PublishOutcome, UnitOutcome, Usage

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "cluster" / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
RULES = yaml.safe_load((DEPLOY / "prometheus-alerts.yaml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
TARGETS = [(panel["title"], target) for panel in DASHBOARD["panels"] for target in panel["targets"]]
EXPRESSIONS = [
    *(pytest.param(target["expr"], id=title) for title, target in TARGETS),
    *(pytest.param(alert["expr"], id=alert["alert"]) for alert in ALERTS),
]


def parse(expression):
    """Grafana puts a duration in place of its variable."""
    return promql_parser.parse(expression.replace("$__rate_interval", "5m"))


def walk(node, by=()):
    """Yield each selector of a metric, with the labels that what surrounds it asks for."""
    match node:
        case promql_parser.VectorSelector():
            yield node, frozenset(by)
        case promql_parser.MatrixSelector():
            yield node.vector_selector, frozenset(by)
        case promql_parser.AggregateExpr():
            if node.modifier is not None:
                assert node.modifier.type == promql_parser.AggModifierType.By
            yield from walk(node.expr, () if node.modifier is None else node.modifier.labels)
        case promql_parser.BinaryExpr():
            yield from walk(node.lhs, by)
            yield from walk(node.rhs, by)
        case promql_parser.Call():
            for argument in node.args:
                yield from walk(argument, by)
        case promql_parser.ParenExpr() | promql_parser.SubqueryExpr():
            yield from walk(node.expr, by)
        case promql_parser.NumberLiteral():
            return
        case _:
            pytest.fail(f"no test knows what {type(node).__name__} asks for")


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


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_what_is_asked_for_is_exported(expression, exported):
    selectors = list(walk(parse(expression)))
    assert selectors
    for selector, labels in selectors:
        assert selector.name in exported
        has = exported[selector.name]
        assert labels <= has.keys()
        for matcher in selector.matchers.matchers:
            values = set(matcher.value.split("|"))
            assert values <= has[matcher.name], f"{selector.name}: {matcher.name} is never one of these"


@pytest.mark.ray
@pytest.mark.slow
def test_the_dashboard_shows_every_metric(exported):
    asked = {selector.name for _, target in TARGETS for selector, _ in walk(parse(target["expr"]))}
    assert asked == exported.keys()


def test_states_that_count_as_left_are_those_that_are_not_final():
    (expression,) = [alert["expr"] for alert in ALERTS if alert["alert"] == "MergefleetDriverGone"]
    (final,) = re.findall(r'state!~"([A-Z_|]+)"', expression)
    assert {JobState(state) for state in final.split("|")} == FINAL_STATES


@pytest.mark.parametrize("target", [pytest.param(target, id=title) for title, target in TARGETS])
def test_legends_name_labels_that_are_left(target):
    """A sum by other labels would leave the legend of a line empty."""
    used = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    outermost = parse(target["expr"])
    assert isinstance(outermost, promql_parser.AggregateExpr), "each process would be a line of its own"
    assert used == set(outermost.modifier.labels if outermost.modifier is not None else ())


def test_the_dashboard_is_one_that_grafana_lays_out():
    """What Grafana's importer needs of a dashboard; panels keep to its 24 columns and do not lie on one another."""
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time"} <= DASHBOARD.keys()
    assert "id" not in DASHBOARD, "Grafana gives it"
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    (variable,) = DASHBOARD["templating"]["list"]
    assert (variable["type"], variable["query"]) == ("datasource", "prometheus")
    cells = set()
    for panel in panels:
        assert panel["type"] in {"stat", "timeseries"}
        assert panel["title"]
        for place in (panel, *panel["targets"]):
            assert place["datasource"] == {"type": "prometheus", "uid": f"${{{variable['name']}}}"}
        ids = [target["refId"] for target in panel["targets"]]
        assert len(set(ids)) == len(ids)
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & cells, panel["title"]
        cells |= own


def test_alerts_say_what_happened_and_what_to_do():
    names = [alert["alert"] for alert in ALERTS]
    assert len(set(names)) == len(names)
    for alert in ALERTS:
        assert alert.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert alert["labels"]["severity"] in {"critical", "warning"}
        assert alert["annotations"].keys() == {"summary", "description"}


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool, which comes with Prometheus, is not on this machine"
)
def test_alerts_fire_when_they_should_and_not_before(tmp_path):
    """By Prometheus itself, on series such as drivers leave. Texts are left out: they are not what is tested."""
    for alert in ALERTS:
        del alert["annotations"]
    (tmp_path / "prometheus-alerts.yaml").write_text(yaml.safe_dump(RULES))
    shutil.copy(ROOT / "tests" / "unit" / "cluster" / "deploy" / "alerts.yaml", tmp_path)
    result = subprocess.run(
        ["promtool", "test", "rules", "alerts.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
