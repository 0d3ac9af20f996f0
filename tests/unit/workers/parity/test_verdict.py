"""The verdict: every reason against publishing is in the report, and what is told of it is true."""

import dataclasses
import json
import math
import shutil
import stat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.errors import BadInputError
from jobs.parity_policy import Thresholds
from jobs.parity_report import BehaviourCheck, ParityReport, ParitySummary, PromptCheck, TensorCheck
from tests.merges import plan_pass
from tests.models import build_llama, make_adapter
from workers.parity.effect import effect_remarks, keeps_effect, proves_adapter
from workers.parity.verdict import judge, summarize, write_report, wrong_headers

THRESHOLDS = {"max_rounding_excess": 1.0, "max_mean_kl": 2e-3, "min_top1_agreement": 0.97}


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parity")
    base = build_llama(directory / "base", max_shard_size="100KB", tokenizer=False)
    adapter = make_adapter(base, directory / "adapter", targets=["q_proj"])
    planned = plan_pass(base, {"job": adapter}, directory, parity={"level": "arithmetic", "thresholds": THRESHOLDS})
    assert planned.run().errors == {}
    return planned


@pytest.fixture
def plan(merged):
    return merged.plans[0]


@pytest.fixture
def directory(merged, tmp_path):
    return shutil.copytree(merged.output("job"), tmp_path / "merged")


def tensor(name="t", **fields):
    return TensorCheck(**{"tensor": name, "changed": True, "max_abs_error": 0.01, "rounding_excess": 0.5} | fields)


def behaviour(*, gates=True, mean_kl=1e-5, top1_agreement=1.0):
    prompt = PromptCheck(
        prompt="p",
        reference_text="a",
        merged_text="a",
        num_positions=4,
        num_near_ties=0,
        max_abs_logit_difference=0.1,
        mean_abs_logit_difference=0.01,
        mean_kl=mean_kl,
        top1_agreement=top1_agreement,
        reference_nll=2.0,
        merged_nll=2.0,
    )
    return BehaviourCheck(
        reference="base in 4-bit + adapter" if gates else "base in 16-bit + adapter",
        gates=gates,
        prompts=(prompt,),
        max_abs_logit_difference=0.1,
        mean_kl=mean_kl,
        adapter_kl=0.3,
        top1_agreement=top1_agreement,
        num_positions=4,
        num_near_ties=0,
        near_tie_margin=0.1,
        reference_nll=2.0,
        merged_nll=2.0,
    )


def test_a_right_merge_passes(merged, plan, directory):
    report = judge(plan, wrong_headers(plan.output, directory), list(merged.check()["job"].values()), [behaviour()])
    assert (report.passed, report.failures) == (True, ())
    assert {check.tensor for check in report.tensors} == set(plan.output.tensors)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(excess=st.floats(0, 3), kl=st.floats(0, 5e-3), agreement=st.floats(0.9, 1))
def test_it_passes_only_within_every_threshold(merged, excess, kl, agreement):
    checks = [tensor(rounding_excess=excess)]
    report = judge(
        merged.plans[0],
        wrong_headers(merged.plans[0].output, merged.output("job")),
        checks,
        [behaviour(mean_kl=kl, top1_agreement=agreement)],
    )
    within = [excess <= 1.0, kl <= 2e-3, agreement >= 0.97]
    assert report.passed == all(within)
    assert len(report.failures) == within.count(False)


def test_level_full_is_not_passed_without_a_comparison(plan, directory):
    policy = plan.request.parity.model_copy(update={"level": "full"})
    full = dataclasses.replace(plan, request=plan.request.model_copy(update={"parity": policy}))
    for checks in ([], [behaviour(gates=False)]):
        report = judge(full, wrong_headers(full.output, directory), [tensor()], checks)
        assert not report.passed
        assert "was not compared with base + adapter" in report.failures[0]
    assert judge(full, wrong_headers(full.output, directory), [tensor()], [behaviour()]).passed


def test_what_is_for_information_gates_nothing(plan, directory):
    checks = [behaviour(), behaviour(gates=False, mean_kl=3.0, top1_agreement=0.1)]
    assert judge(plan, wrong_headers(plan.output, directory), [tensor()], checks).passed


@pytest.mark.parametrize(
    ("share", "rounding_kl", "passed", "proves"),
    [
        (0.05, 1e-5, True, True),
        (0.07, 1e-5, False, True),
        (1.0, 1e-5, False, True),
        (0.49, 4e-4, True, True),  # rounding takes 0.4, and may take a quarter of that more
        (0.51, 4e-4, False, True),
        (1.0, 9e-4, True, False),
        (float("nan"), 1e-5, False, True),
    ],
)
def test_no_more_of_the_adapters_effect_is_lost_than_rounding_and_threshold_allow(
    plan, directory, share, rounding_kl, passed, proves
):
    fields = {"lost_share": share, "mean_kl": 1e-3 * share if math.isfinite(share) else 0.0, "adapter_kl": 1e-3}
    check = behaviour().model_copy(update=fields | {"rounding_kl": rounding_kl})
    report = judge(plan, wrong_headers(plan.output, directory), [tensor()], [check])
    assert report.passed == passed
    assert proves_adapter(check, Thresholds()) == proves
    for informs in ({"gates": False}, {"lost_share": None}):
        assert judge(plan, [], [tensor()], [behaviour(), check.model_copy(update=informs)]).passed
    if not passed and math.isfinite(share):
        expected = (
            f"{share:.3g} of the adapter's effect is lost: mean KL to base in 4-bit + adapter is {share * 1e-3:.3g} "
            f"nats, to the base alone 0.001; expected a share of at most "
            f"{rounding_kl * 1e3 + max(0.05, rounding_kl * 250):.3g}, {rounding_kl * 1e3:.3g} of it by rounding"
        )
        assert report.failures == (expected,)


def test_a_lenient_threshold_is_told_to_prove_nothing():
    check = behaviour().model_copy(update={"lost_share": 1.0, "rounding_kl": 1e-5})
    lenient = Thresholds(max_lost_share=1)
    assert keeps_effect(check, lenient)
    [remark] = effect_remarks(check, lenient, "bfloat16")
    assert remark.startswith("A merge without the adapter would pass with max_lost_share 1 ")


@pytest.mark.parametrize("figure", ["mean_kl", "top1_agreement"])
def test_a_figure_that_is_no_number_is_not_within(plan, directory, figure):
    check = behaviour().model_copy(update={figure: float("nan")})
    assert not judge(plan, wrong_headers(plan.output, directory), [tensor()], [check]).passed


def test_reasons_name_the_tensor_and_the_figures(plan, directory):
    checks = [tensor("model.norm.weight", rounding_excess=30.0, max_abs_error=0.25, num_bad_elements=7)]
    report = judge(plan, wrong_headers(plan.output, directory), checks, [behaviour(mean_kl=0.5, top1_agreement=0.5)])
    first, second, third = report.failures
    assert "tensor model.norm.weight: 7 elements" in first
    assert "0.25" in first
    assert "30" in first
    assert "mean KL to base in 4-bit + adapter is 0.5 nats, expected at most 0.002" in second
    assert "top-1 agreement with base in 4-bit + adapter is 0.5000, expected at least 0.97" in third


def test_a_merge_that_is_wrong_everywhere_is_told_shortly(plan, directory):
    checks = [tensor(f"t{n}", rounding_excess=2.0 + n, num_bad_elements=1) for n in range(50)]
    report = judge(plan, wrong_headers(plan.output, directory), checks, [])
    assert len(report.failures) == 21
    assert "tensor t49:" in report.failures[0]
    assert report.failures[-1] == "30 more tensors are not base + delta"


def test_an_unchanged_tensor_has_no_tolerance(plan):
    lenient = plan.request.parity.thresholds.model_copy(update={"max_rounding_excess": 100.0})
    policy = plan.request.parity.model_copy(update={"thresholds": lenient})
    plan = dataclasses.replace(plan, request=plan.request.model_copy(update={"parity": policy}))
    checks = [tensor("same", changed=False, rounding_excess=2.0, num_bad_elements=1), tensor(rounding_excess=50.0)]
    assert [reason.split(":")[0] for reason in judge(plan, [], checks, []).failures] == ["tensor same"]


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def pad_header(path):
    """Write the same header with eight spaces more: a file that is right, but not the one that was planned."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes((end - 8 + 8).to_bytes(8, "little") + data[8:end] + b" " * 8 + data[end:])


DAMAGE = {
    "header": (lambda path: flip(path, 30), "its header is not the one that was planned|JSON header"),
    "length": (lambda path: flip(path, 0), "safetensors header|JSON header|describes"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "it is truncated or corrupt"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "it is truncated or corrupt"),
    "missing": (lambda path: path.unlink(), "expected this file, found nothing"),
    "spaces": (pad_header, "its header is not the one that was planned"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_shard_that_is_not_as_planned_fails(plan, directory, damage):
    shard = plan.output.shards[1].name
    apply, phrase = DAMAGE[damage]
    apply(directory / shard)
    (wrong,) = wrong_headers(plan.output, directory)
    assert shard in wrong
    assert any(part in wrong for part in phrase.split("|"))
    report = judge(plan, wrong_headers(plan.output, directory), [], [])
    assert (report.passed, report.failures) == (False, (wrong,))


def test_whole_shards_have_right_headers(plan, directory):
    assert wrong_headers(plan.output, directory) == []


def test_a_summary_holds_the_extremes(plan, directory):
    checks = [
        tensor("a", rounding_excess=0.2, survival=0.9),
        tensor("b", rounding_excess=0.7, survival=0.99),
        tensor("c", rounding_excess=0.0, changed=False),
    ]
    report = judge(
        plan,
        wrong_headers(plan.output, directory),
        checks,
        [behaviour(gates=False, mean_kl=0.1), behaviour(mean_kl=1e-4)],
    )
    summary = summarize(report)
    assert (summary.num_tensors, summary.num_changed_tensors) == (3, 2)
    assert (summary.rounding_excess, summary.min_survival) == (0.7, 0.9)
    assert (summary.mean_kl, summary.top1_agreement) == (1e-4, 1.0)
    assert (summary.adapter_kl, summary.num_positions) == (0.3, 4)


def test_a_summary_of_arithmetic_alone_claims_no_behaviour(plan, directory):
    summary = summarize(judge(plan, wrong_headers(plan.output, directory), [tensor(changed=False)], []))
    assert (summary.mean_kl, summary.top1_agreement, summary.min_survival) == (None, None, None)


def test_a_summary_tells_what_the_adapter_does_and_what_is_lost(plan, directory):
    figures = {"kl_p999": 2e-3, "lost_share": 0.01, "proves_adapter": True}
    check = behaviour().model_copy(update=figures)
    summary = summarize(judge(plan, wrong_headers(plan.output, directory), [tensor()], [check]))
    assert summary.model_dump(include=set(figures)) == figures


def test_a_report_and_a_summary_of_an_earlier_version_are_read(plan, directory):
    report = judge(plan, wrong_headers(plan.output, directory), [tensor()], [behaviour()])
    written = json.loads(report.model_dump_json(by_alias=True))
    later = {"kl_p999", "lost_share", "rounding_kl", "proves_adapter", "mean_delta_p", "remarks"}
    assert not later & written["behaviour"][0].keys()
    del written["thresholds"]["max_lost_share"]
    assert ParityReport.model_validate(written) == report
    summary = json.loads(summarize(report).model_dump_json())
    for name in ("kl_p999", "adapter_kl", "lost_share", "proves_adapter", "num_positions"):
        summary.pop(name, None)
    assert ParitySummary.model_validate(summary).num_positions is None


def test_a_report_is_written_as_json_and_as_a_page(merged, plan, directory, tmp_path):
    report = judge(plan, wrong_headers(plan.output, directory), list(merged.check()["job"].values()), [behaviour()])
    write_report(report, tmp_path / "reports" / "job")
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "reports", tmp_path / "reports" / "job")} == {
        0o700
    }
    written = (tmp_path / "reports" / "job" / "parity.json").read_text()
    assert ParityReport.model_validate_json(written) == report
    assert json.loads(written)["schema"] == 1
    assert "model.layers.0.self_attn.q_proj.weight" in (tmp_path / "reports" / "job" / "parity.html").read_text()


def test_a_report_takes_the_place_of_an_earlier_one(plan, directory, tmp_path):
    for passed in (False, True):
        report = judge(
            plan, wrong_headers(plan.output, directory), [tensor(rounding_excess=0.5 if passed else 5.0)], []
        )
        write_report(report, tmp_path / "job")
    assert ParityReport.model_validate_json((tmp_path / "job" / "parity.json").read_text()).passed


def test_a_place_that_takes_no_report_is_named(plan, directory, tmp_path):
    (tmp_path / "file").write_text("in the way")
    report = judge(plan, wrong_headers(plan.output, directory), [], [])
    with pytest.raises(BadInputError, match="file/job"):
        write_report(report, tmp_path / "file" / "job")
