"""The dashboard and the alerts: what they ask for is registered, and they are what Grafana and Prometheus take."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import promql_parser
import pytest
import yaml

from jobs.states import FINAL_STATES, JobState
from tests.queries import ALERTS, DASHBOARD, EXPRESSIONS, RULES, TARGETS, parse, selectors

_TELL_METRICS = """
import json
from cluster.ray_fleet.metrics import FleetMetrics
metrics = [each for each in vars(FleetMetrics()).values() if hasattr(each, "info")]
print(json.dumps({f"ray_{each.info['name']}": each.info["tag_keys"] for each in metrics}))
"""


@pytest.fixture(scope="module")
def registered():
    """Name to labels of every metric of a driver, by a process of its own: this one imports no Ray."""
    result = subprocess.run([sys.executable, "-c", _TELL_METRICS], capture_output=True, text=True, check=True)
    return {name: set(labels) for name, labels in json.loads(result.stdout).items()}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_what_is_asked_for_is_registered(name, registered):
    found = selectors(EXPRESSIONS[name])
    assert found
    for selector, labels in found:
        asked = labels | {matcher.name for matcher in selector.matchers.matchers}
        assert asked <= registered[selector.name]


def test_the_dashboard_shows_every_metric(registered):
    assert {selector.name for _, target in TARGETS for selector, _ in selectors(target["expr"])} == registered.keys()


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
    shutil.copy(Path(__file__).with_name("alerts.yaml"), tmp_path)
    result = subprocess.run(
        ["promtool", "test", "rules", "alerts.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
