"""What the dashboard and the alerts of `cluster/deploy` ask Prometheus for, as its own grammar reads it."""

import json
from collections.abc import Iterator
from pathlib import Path

import promql_parser
import yaml

DEPLOY = Path(__file__).parents[1] / "cluster" / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
RULES = yaml.safe_load((DEPLOY / "prometheus-alerts.yaml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
TARGETS = [(panel["title"], target) for panel in DASHBOARD["panels"] for target in panel["targets"]]
EXPRESSIONS = {
    **{f"{title}: {target['legendFormat']}": target["expr"] for title, target in TARGETS},
    **{alert["alert"]: alert["expr"] for alert in ALERTS},
}


def parse(expression: str) -> promql_parser.Expr:
    """Parse an expression, with a duration where Grafana puts one."""
    return promql_parser.parse(expression.replace("$__rate_interval", "5m"))


def selectors(expression: str) -> list[tuple[promql_parser.VectorSelector, frozenset[str]]]:
    """Return each selector of a metric, with the labels that it is summed by."""
    return list(_walk(parse(expression), ()))


def _walk(
    node: promql_parser.Expr, by: tuple[str, ...]
) -> Iterator[tuple[promql_parser.VectorSelector, frozenset[str]]]:
    match node:
        case promql_parser.VectorSelector():
            yield node, frozenset(by)
        case promql_parser.MatrixSelector():
            yield node.vector_selector, frozenset(by)
        case promql_parser.AggregateExpr():
            if node.modifier is not None and node.modifier.type != promql_parser.AggModifierType.By:
                raise ValueError(f"only sums by labels are known here, found {node.prettify()}")
            yield from _walk(node.expr, () if node.modifier is None else tuple(node.modifier.labels))
        case promql_parser.BinaryExpr():
            yield from _walk(node.lhs, by)
            yield from _walk(node.rhs, by)
        case promql_parser.Call():
            for argument in node.args:
                yield from _walk(argument, by)
        case promql_parser.ParenExpr() | promql_parser.SubqueryExpr():
            yield from _walk(node.expr, by)
        case promql_parser.NumberLiteral():
            return
        case _:
            raise ValueError(f"nothing here knows what {type(node).__name__} asks for")
