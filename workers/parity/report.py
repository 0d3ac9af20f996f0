"""A parity report as one HTML page with pictures: self-contained, nothing is fetched, no script runs."""

import difflib
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup, escape

from jobs.parity_policy import MIN_REQUANTIZED_SURVIVAL, Thresholds
from jobs.parity_report import BehaviourCheck, ParityReport, PromptCheck, TensorCheck
from jobs.text import shown
from workers.parity.charts import NUM_COLOURS, WIDTH, LayerChart, RowChart, figure, kind_of, layer_chart, row_chart
from workers.parity.effect import allowed_share, keeps_effect

_TEMPLATE = Path(__file__).with_name("report.html.j2")

_NUM_LISTED = 50
"""Wrong tensors in the table; a merge that is wrong everywhere needs no list of everything."""

_LABEL_LENGTH = 34
_MAX_TEXT = 20_000
_WORD = re.compile(r"\s+|\w+|\W")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauge:
    """A figure beside its threshold."""

    name: str
    value: str
    limit: str
    filled: float
    """How much of what is allowed is used up, in percent, at most 100."""
    verdict: Literal["passed", "failed", "proves nothing"]
    note: str


def render_report(report: ParityReport) -> str:
    """Return a parity report as one HTML page.

    Args:
        report: passed or not; prompts, names and messages in it are untrusted and are escaped.
    """
    changed = [check for check in report.tensors if check.changed]
    wrong = [check for check in report.tensors if _is_wrong(check, report)]
    kinds = list(dict.fromkeys(kind_of(check.tensor) for check in changed))
    colours = {kind: min(number, NUM_COLOURS) for number, kind in enumerate(kinds)}
    return _template().render(
        report=report,
        gauges=_gauges(report, len(wrong)),
        layer_charts=[chart for chart in _layer_charts(report, changed, colours) if chart is not None],
        row_charts=[chart for chart in _row_charts(report) if chart is not None],
        legend=[(kind, colour) for kind, colour in colours.items() if colour < NUM_COLOURS],
        has_others=len(kinds) > NUM_COLOURS or len(changed) < len(report.tensors),
        wrong=sorted(wrong, key=lambda check: check.rounding_excess, reverse=True)[:_NUM_LISTED],
        num_wrong=len(wrong),
        num_changed=len(changed),
        gating=next((check for check in report.behaviour if check.gates), None),
        least_survival=MIN_REQUANTIZED_SURVIVAL,
        width=WIDTH,
        figure=figure,
        exact="{:.4f}".format,
        percent=_percent_words,
        mark=_mark_differences,
    )


@functools.cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_visible
    )
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _visible(value: Any) -> Any:
    return shown(value, _MAX_TEXT, lines=True) if type(value) is str else value


def _is_wrong(check: TensorCheck, report: ParityReport) -> bool:
    wrong_bits = check.num_bad_elements > 0 and not check.targeted
    return wrong_bits or not check.rounding_excess <= report.thresholds.max_rounding_excess


def _gauges(report: ParityReport, num_wrong: int) -> list[Gauge]:
    limits = report.thresholds
    worst = max((check.rounding_excess for check in report.tensors), default=0.0)
    gauges = [
        Gauge(
            name="Arithmetic error",
            value=figure(worst),
            limit=f"≤ {figure(limits.max_rounding_excess)}",
            filled=_percent(worst, limits.max_rounding_excess),
            verdict=_verdict(passed=not num_wrong),
            note="largest difference from base + delta, in units of what one rounding may leave",
        )
    ]
    for check in report.behaviour:
        if not check.gates:
            continue
        num_decided = check.num_positions - check.num_near_ties
        disagreement = 1 - check.top1_agreement
        gauges += [
            Gauge(
                name="Mean KL divergence",
                value=figure(check.mean_kl),
                limit=f"≤ {figure(limits.max_mean_kl)} nats",
                filled=_percent(check.mean_kl, limits.max_mean_kl),
                verdict=_verdict(passed=check.mean_kl <= limits.max_mean_kl),
                note=f"from {check.reference}; the adapter itself moves the model by {figure(check.adapter_kl)}",
            ),
            Gauge(
                name="Top-1 agreement",
                value=f"{100 * check.top1_agreement:.4g} %",
                limit=f"≥ {100 * limits.min_top1_agreement:.4g} %",
                filled=_percent(disagreement, 1 - limits.min_top1_agreement),
                verdict=_verdict(passed=check.top1_agreement >= limits.min_top1_agreement),
                note=f"same most likely token, over {num_decided} of {check.num_positions} positions; at the others "
                f"the reference's two best logits are within {figure(check.near_tie_margin)}",
            ),
            *_effect_gauges(check, limits),
        ]
    return gauges


def _effect_gauges(check: BehaviourCheck, limits: Thresholds) -> list[Gauge]:
    if check.proves_adapter is None:
        return []
    lost, allowed = check.lost_share or 0.0, allowed_share(check, limits)
    passed = keeps_effect(check, limits)
    return [
        Gauge(
            name="Adapter's effect lost",
            value="-" if check.lost_share is None else f"{100 * lost:.3g} %",
            limit=f"≤ {100 * allowed:.3g} %" if check.proves_adapter else "",
            filled=_percent(lost, allowed),
            verdict="proves nothing" if passed and not check.proves_adapter else _verdict(passed=passed),
            note=f"KL to the merged checkpoint over that to the base alone, {figure(check.adapter_kl)}; rounding to "
            f"the output's dtype by itself is {figure(check.rounding_kl)} away",
        )
    ]


def _verdict(*, passed: bool) -> Literal["passed", "failed"]:
    return "passed" if passed else "failed"


def _percent_words(share: float | None) -> str:
    return "-" if share is None else f"{figure(100 * share)} %"


def _percent(value: float, limit: float) -> float:
    if value <= 0:
        return 0.0
    return round(100 * min(value / limit, 1), 1) if limit > 0 else 100.0


def _layer_charts(
    report: ParityReport, changed: list[TensorCheck], colours: dict[str, int]
) -> tuple[LayerChart | None, ...]:
    limit = report.thresholds.max_rounding_excess
    return (
        layer_chart(
            "Size of the delta",
            "What the adapter adds to a weight, over the weight: |Δ| / |W|, Frobenius norms.",
            {c.tensor: c.delta_norm / c.weight_norm for c in changed if c.weight_norm > 0},
            colours,
            is_log=True,
        ),
        layer_chart(
            "Quantization error over delta",
            "What 4 bits changed of a weight, over what the adapter adds to it: |W₄ - W| / |Δ|. An adapter that was "
            "trained on those 4 bits has learned with it; for one that was trained on W it is noise.",
            {
                c.tensor: c.quantization_error / c.delta_norm
                for c in changed
                if c.quantization_error and c.delta_norm > 0
            },
            colours,
            is_log=True,
        ),
        layer_chart(
            "Survival of the delta",
            "How much of the delta is left once the sum is rounded to the output's dtype; 1 is all of it.",
            {c.tensor: c.survival for c in changed if c.survival is not None},
            colours,
            include=(0.999, 1.001),
        ),
        layer_chart(
            "Arithmetic error",
            "Largest difference from base + delta over all elements, in units of what one rounding may leave.",
            {c.tensor: c.rounding_excess for c in report.tensors},
            colours,
            limit=limit,
            is_log=any(c.rounding_excess > 10 * limit for c in report.tensors),
            include=() if limit else (1.0,),
        ),
    )


def _row_charts(report: ParityReport) -> tuple[RowChart | None, ...]:
    if not report.behaviour:
        return ()
    checks = sorted(report.behaviour, key=lambda check: not check.gates)
    labels = [_shorten(prompt.prompt) for prompt in checks[0].prompts]
    gates = checks[0].gates
    return (
        row_chart(
            "KL divergence, per prompt",
            "From each reference to the merged checkpoint, in nats, mean over positions. The threshold is for the mean "
            "over all prompts.",
            labels,
            [[prompt.mean_kl for prompt in check.prompts] for check in checks],
            limit=report.thresholds.max_mean_kl if gates else None,
        ),
        row_chart(
            "Logit difference, per prompt",
            "Largest difference of any logit at any position.",
            labels,
            [[prompt.max_abs_logit_difference for prompt in check.prompts] for check in checks],
        ),
        row_chart(
            "Adapter's effect lost, per prompt",
            "KL divergence from each reference to the merged checkpoint, over that to the reference's base without the "
            "adapter. 1 is an adapter that was left out. The threshold is for the share over all prompts.",
            labels,
            [[_lost_share(prompt) for prompt in check.prompts] for check in checks],
            limit=allowed_share(checks[0], report.thresholds) if checks[0].proves_adapter else None,
        ),
        row_chart(
            "Change of the right token's probability, per prompt",
            "Root mean square, over positions, of what the probability of the token that comes next changes by.",
            labels,
            [[prompt.rms_delta_p or 0.0 for prompt in check.prompts] for check in checks],
        ),
    )


def _lost_share(prompt: PromptCheck) -> float:
    return prompt.mean_kl / prompt.adapter_kl if prompt.adapter_kl else 0.0


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LABEL_LENGTH else line[: _LABEL_LENGTH - 1] + "…"


def _mark_differences(prompt: PromptCheck) -> tuple[Markup, Markup]:
    """Return both answers; the words that the other does not have are marked."""
    reference, merged = _WORD.findall(prompt.reference_text), _WORD.findall(prompt.merged_text)
    marked: tuple[list[str], list[str]] = ([], [])
    matcher = difflib.SequenceMatcher(a=reference, b=merged, autojunk=False)
    for kind, *spans in matcher.get_opcodes():
        for side, words, (start, stop) in zip(marked, (reference, merged), (spans[:2], spans[2:]), strict=True):
            text = escape(_visible("".join(words[start:stop])))
            side.append(text if kind == "equal" or not text else Markup("<mark>{}</mark>").format(text))
    return Markup("").join(marked[0]), Markup("").join(marked[1])
