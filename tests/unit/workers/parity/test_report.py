"""The parity report as a page: complete, escaped, self-contained, and drawn where it should be."""

import json
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import Any

import pytest

from jobs.parity_policy import Thresholds
from jobs.parity_report import BehaviourCheck, ParityReport, PromptCheck, TensorCheck
from workers.parity.charts import figure, kind_of, layer_chart, layer_of, row_chart
from workers.parity.report import render_report

VOID = {"meta", "br"}
KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


class Page(HTMLParser):
    """Checks that tags nest, and collects text and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def tensor(name: str, **fields: Any) -> TensorCheck:
    values = {"changed": True, "max_abs_error": 1e-3, "rounding_excess": 0.99, "weight_norm": 10.0, "delta_norm": 0.2}
    return TensorCheck(tensor=name, **values | {"survival": 0.998} | fields)


def prompt(text: str, **fields: Any) -> PromptCheck:
    return PromptCheck(
        prompt=text,
        **{
            "reference_text": "Paris, of course",
            "merged_text": "Paris, of course",
            "num_positions": 20,
            "num_near_ties": 2,
            "max_abs_logit_difference": 0.3,
            "mean_abs_logit_difference": 0.05,
            "mean_kl": 2e-4,
            "top1_agreement": 1.0,
            "reference_nll": 3.1,
            "merged_nll": 3.2,
        }
        | fields,
    )


def behaviour(*prompts: PromptCheck, **fields: Any) -> BehaviourCheck:
    return BehaviourCheck(
        prompts=prompts,
        **{
            "reference": "the base in nf4 + adapter",
            "gates": True,
            "max_abs_logit_difference": 0.3,
            "mean_kl": 2e-4,
            "adapter_kl": 1.5,
            "top1_agreement": 1.0,
            "num_positions": 20,
            "num_near_ties": 2,
            "near_tie_margin": 0.25,
            "reference_nll": 3.1,
            "merged_nll": 3.2,
        }
        | fields,
    )


def report(**fields: Any) -> ParityReport:
    tensors = [tensor(f"model.layers.{layer}.{kind}.weight") for layer in range(4) for kind in KINDS]
    unchanged = tensor("model.norm.weight", changed=False, rounding_excess=0, max_abs_error=0, survival=None)
    values: dict[str, Any] = {
        "request_id": "my-merge",
        "merge_key": "ab" * 32,
        "base": "/bases/llama",
        "adapter": "/adapters/pirate",
        "base_quantization": "nf4",
        "level": "full",
        "thresholds": Thresholds(),
        "passed": True,
        "failures": (),
        "tensors": (*tensors, unchanged),
        "behaviour": (
            behaviour(prompt("The capital of France is")),
            behaviour(
                prompt("The capital of France is", mean_kl=0.4, merged_text="Paris, no doubt"),
                reference="the base in its own weights + adapter",
                gates=False,
                mean_kl=0.4,
            ),
        ),
    }
    return ParityReport(**values | fields)


def pictures(html: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def test_page_says_what_passed_with_figures_beside_thresholds():
    page = Page(render_report(report()))
    words = " ".join(page.text.split())
    assert "Parity passed my-merge" in words
    assert "All 13 tensors, 12 of them changed" in words
    for part in (
        "/bases/llama",
        "/adapters/pirate",
        "ab" * 32,
        "0.0002",
        "≤ 0.005 nats",
        "100 %",
        "≥ 97 %",
        "18 of 20",
    ):
        assert part in words
    assert "the adapter itself moves the model by 1.5" in words
    assert "failed" not in words.lower()


def test_failures_come_first():
    wrong = tensor("model.layers.2.mlp.down_proj.weight", rounding_excess=2100.0, num_bad_elements=77)
    failing = report(
        passed=False,
        failures=("tensor model.layers.2.mlp.down_proj.weight: 77 elements are wrong",),
        tensors=(*report().tensors[:8], wrong),
        behaviour=(behaviour(prompt("a", mean_kl=0.1, top1_agreement=0.5), mean_kl=0.1, top1_agreement=0.5),),
    )
    html = render_report(failing)
    words = " ".join(Page(html).text.split())
    assert words.index("Parity failed: nothing was published") < words.index("77 elements are wrong")
    assert words.index("77 elements are wrong") < words.index("Layer by layer")
    assert words.count("failed") == 4  # the verdict and three gauges
    assert "2.1e+03" in words
    beyond = [circle for svg in pictures(html) for circle in svg.iter("circle") if circle.get("class") == "beyond"]
    assert ["2.1e+03" in (circle.findtext("title") or "") for circle in beyond].count(True) == 1
    assert len(beyond) == 2  # one tensor, one prompt


def test_differing_words_are_marked_in_both_answers():
    differing = prompt("a", reference_text="Paris is large", merged_text="Paris was large")
    html = render_report(report(behaviour=(behaviour(differing),)))
    assert "Paris <mark>is</mark> large" in html
    assert "Paris <mark>was</mark> large" in html


def test_everything_from_outside_is_escaped():
    evil = "</text><script>alert('x')</script><img src=x onerror=\"alert(1)\">&amp;"
    page = Page(
        render_report(
            report(
                base=f"/bases/{evil}",
                passed=False,
                failures=(evil,),
                notes=(evil,),
                tensors=(tensor(f"model.layers.0.{evil}.weight", rounding_excess=5.0),),
                behaviour=(
                    behaviour(prompt(evil, reference_text=evil, merged_text=evil + "!"), reference=evil),
                    behaviour(prompt(evil), reference=evil, gates=False),
                ),
            )
        )
    )
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(evil) >= 7


def test_notes_are_told_and_take_no_room_where_there_are_none():
    note = "generation_config.json ends at 1 and the tokenizer at 2"
    assert note in Page(render_report(report(notes=(note,)))).text
    assert "To know before it is used" not in Page(render_report(report())).text
    assert json.loads(report(notes=(note,)).model_dump_json())["notes"] == [note]
    assert "notes" not in report().model_dump_json()


def test_page_is_self_contained():
    html = render_report(report())
    assert not re.search(r"https?:|//|\burl\(|@import|<script|<link|<img|\bsrc=", html)
    assert "prefers-color-scheme: dark" in html
    for svg in pictures(html):
        width, height = map(float, svg.attrib["viewBox"].split()[2:])
        for circle in svg.iter("circle"):
            assert 0 < float(circle.attrib["cx"]) < width
            assert 0 < float(circle.attrib["cy"]) < height


def test_every_tensor_and_every_prompt_is_in_the_pictures():
    html = render_report(report())
    assert len(pictures(html)) == 5
    titles = [element.text or "" for svg in pictures(html) for element in svg.iter("title")]
    for check in report().tensors:
        assert sum(title.startswith(check.tensor) for title in titles) == (3 if check.changed else 1)
    assert sum("capital of France" in title for title in titles) == 4


def test_arithmetic_level_says_that_no_model_ran():
    page = Page(render_report(report(level="arithmetic", behaviour=())))
    assert "The models were not run (level: arithmetic)" in " ".join(page.text.split())
    assert "Prompt by prompt" not in page.text


EFFECT = {
    "lost_share": 0.0123,
    "rounding_kl": 1e-5,
    "proves_adapter": True,
    "kl_p999": 7.5e-3,
    "mean_delta_p": -1.5e-4,
    "rms_delta_p": 0.0042,
    "delta_p_p001": -0.031,
    "delta_p_p999": 0.029,
}


def test_what_the_adapter_does_and_what_is_lost_is_shown():
    asked = prompt("The capital of France is", adapter_kl=1.0, rms_delta_p=0.004)
    html = render_report(report(behaviour=(behaviour(asked, **EFFECT, remarks=("Prompts were asked.",)),)))
    words = " ".join(Page(html).text.split())
    for part in ("Adapter's effect lostpassed 1.23 %≤ 5 %", "0.0075 99.9 %", "-0.015 % mean, 0.42 % RMS"):
        assert part in words
    assert "-3.1 % to 2.9 %" in words
    assert "Prompts were asked." in words
    titles = [svg.attrib["aria-label"] for svg in pictures(html)]
    assert "Adapter's effect lost, per prompt" in titles
    assert "Change of the right token's probability, per prompt" in titles


def test_a_lost_adapter_fails_its_gauge():
    html = render_report(report(behaviour=(behaviour(prompt("a"), **EFFECT | {"lost_share": 1.0}),)))
    assert "Adapter's effect lostfailed 100 %≤ 5 %" in " ".join(Page(html).text.split())


def test_what_proves_nothing_is_not_shown_as_proof():
    fields = EFFECT | {"lost_share": None, "proves_adapter": False, "adapter_kl": 0.0}
    check = behaviour(prompt("a"), **fields, remarks=("The prompts show no effect.",))
    words = " ".join(Page(render_report(report(behaviour=(check,)))).text.split())
    assert "Adapter's effect lostproves nothing -" in words
    assert "as base + adapter does. The prompts show no effect." in words


def test_report_of_nothing_can_be_shown():
    page = Page(render_report(report(tensors=(), behaviour=(), passed=False, failures=("shard x is missing",))))
    assert "shard x is missing" in page.text


def test_many_wrong_tensors_are_counted_not_all_listed():
    wrong = tuple(
        tensor(f"model.layers.{layer}.mlp.up_proj.weight", rounding_excess=float(layer + 2)) for layer in range(300)
    )
    html = render_report(report(tensors=wrong, passed=False, failures=("x",)))
    assert "300 of 300, the worst first; the first 50 are shown." in " ".join(Page(html).text.split())
    assert html.count("<tr><td><code>model") == 50
    assert html.index("<code>model.layers.299.") < html.index("<code>model.layers.298.")


@pytest.mark.parametrize("value", [0.0, 1e-12, sys.float_info.max])
def test_extreme_values_can_be_drawn(value):
    odd = tensor("model.layers.0.mlp.up_proj.weight", rounding_excess=value, delta_norm=value, survival=value)
    checks = behaviour(prompt("a", mean_kl=value, max_abs_logit_difference=value), mean_kl=value, adapter_kl=value)
    html = render_report(report(tensors=(odd, *report().tensors), behaviour=(checks,)))
    Page(html)
    coordinates = [float(c.attrib[axis]) for svg in pictures(html) for c in svg.iter("circle") for axis in ("cx", "cy")]
    assert all(-1 < coordinate < 1000 for coordinate in coordinates)


def test_threshold_of_zero_can_be_drawn():
    exact = Thresholds(max_rounding_excess=0, min_top1_agreement=1)
    Page(render_report(report(thresholds=exact)))


def test_kinds_and_layers_of_tensor_names():
    assert kind_of("model.layers.12.self_attn.q_proj.weight") == "self_attn.q_proj"
    assert kind_of("model.layers.3.mlp.experts.17.up_proj.weight") == "mlp.experts.*.up_proj"
    assert kind_of("lm_head.weight") == "lm_head"
    assert kind_of("model.layers.0.self_attn.q_proj.bias") == "self_attn.q_proj.bias"
    assert layer_of("transformer.h.7.attn.c_attn.weight") == 7
    assert layer_of("model.embed_tokens.weight") is None


def test_layers_stand_in_their_order_and_larger_is_higher():
    values = {f"model.layers.{layer}.mlp.up_proj.weight": float(layer + 1) for layer in (10, 2, 1)}
    chart = layer_chart("t", "e", values, {"mlp.up_proj": 0})
    assert chart is not None
    dots = chart.series[0].dots
    assert [dot.words.split(".")[2] for dot in dots] == ["1", "2", "10"]
    assert dots[0].x < dots[1].x < dots[2].x
    assert dots[0].y > dots[1].y > dots[2].y
    assert chart.series[0].line.count(",") == 3


def test_several_tensors_of_a_kind_in_one_layer_get_no_line():
    values = {f"model.layers.0.mlp.experts.{n}.up_proj.weight": 1.0 + n for n in range(3)}
    chart = layer_chart("t", "e", values, {})
    assert chart is not None
    assert chart.series[0].line == ""
    assert len(chart.series[0].dots) == 3


def test_nothing_to_draw_is_no_picture():
    assert layer_chart("t", "e", {"a.0.b": 0.0}, {}, is_log=True) is None
    assert row_chart("t", "e", ["a"], [[0.0]]) is None


def test_figures_have_three_digits():
    assert [figure(x) for x in (None, 0.0, 1234.5, 2.586e-4, sys.float_info.max)] == [
        "-",
        "0",
        "1.23e+03",
        "0.000259",
        "not finite",
    ]
