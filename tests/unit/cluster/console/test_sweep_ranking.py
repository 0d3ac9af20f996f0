"""Which jobs are checkpoints of one run, what they are ranked by, and when there is no ranking."""

import dataclasses
import json
import math

import pytest

from cluster.commands.report import write_report
from cluster.console.sweep_ranking import rank_sweeps
from jobs.ledger.selection import Selection
from jobs.ledger.store import JobStore
from jobs.parity_report import ParityReport
from jobs.release import REPORT_NAME
from jobs.request import MergeRequest
from jobs.states import JobState
from tests.releases import advance, begin, make_report

RUN = "/runs/x/checkpoint-{}"


def check_of(nll, held_out=None, *, gates=True):
    figures = {"max_abs_logit_difference": 0.0, "mean_kl": 1e-4, "adapter_kl": 1.0, "top1_agreement": 1.0}
    counts = {"num_positions": 9, "num_near_ties": 0, "near_tie_margin": 0.1}
    check = {"reference": "base + adapter", "gates": gates, "prompts": [], **figures, **counts}
    check |= {"reference_nll": nll + 0.01, "merged_nll": nll}
    if held_out is not None:
        texts = {"num_texts": 3, "num_positions": 9, "base_nll": 7.5, "mean_kl": 1e-4, "top1_agreement": 1.0}
        check["held_out"] = {**texts, "reference_nll": held_out, "merged_nll": held_out}
    return check


def report_of(*checks, passed=True):
    document = json.loads(make_report("a" * 64)) | {"behaviour": list(checks), "level": "full", "passed": passed}
    return ParityReport.model_validate_json(json.dumps(document))


@pytest.fixture
def records(tmp_path):
    """Return the records of jobs for some adapters, as if each had a report."""
    store = JobStore(f"sqlite:///{tmp_path}/jobs.db")

    def make(*adapters, **fields):
        requests = [
            MergeRequest.model_validate(
                {"id": f"job-{number}", "base": "/b", "adapter": each, "destination": f"/out/{number}", **fields}
            )
            for number, each in enumerate(adapters)
        ]
        store.submit(requests, "b")
        return [dataclasses.replace(record, report_path=f"/reports/{record.id}") for record in store.jobs()]

    yield make
    store.close()


def rank(records, reports):
    return rank_sweeps(records, lambda record: reports.get(record.id))


def test_the_best_comes_first_by_held_out_texts_where_all_have_them(records):
    jobs = records(*(RUN.format(step) for step in (100, 900, 1500)))
    on_texts = {"job-0": (1.0, 3.0), "job-1": (2.0, 1.0), "job-2": (3.0, 2.0)}
    (ranking,) = rank(
        jobs, {name: report_of(check_of(9.0, gates=False), check_of(*each)) for name, each in on_texts.items()}
    )
    assert [(row.step, row.nll) for row in ranking.rows] == [(900, 1.0), (1500, 2.0), (100, 3.0)]
    assert (ranking.run, ranking.num_texts, ranking.base_nll, ranking.num_missing) == (
        "/runs/x/checkpoint-*",
        3,
        7.5,
        0,
    )
    reports = {name: report_of(check_of(*each)) for name, each in on_texts.items()}
    (ranking,) = rank(jobs, reports | {"job-2": report_of(check_of(0.5))})
    assert [(row.step, row.nll) for row in ranking.rows] == [(1500, 0.5), (100, 1.0), (900, 2.0)]
    assert (ranking.num_texts, ranking.base_nll) == (None, None)


def test_jobs_without_figures_are_counted_and_left_out(records):
    jobs = records(*(RUN.format(step) for step in range(6)))
    reports = {
        "job-0": report_of(check_of(1.0)),
        "job-1": report_of(check_of(2.0)),
        "job-2": report_of(check_of(0.1), passed=False),
        "job-3": report_of(),
        "job-4": report_of(check_of(0.1, gates=False)),
    }
    (ranking,) = rank(jobs, reports)
    assert [row.step for row in ranking.rows] == [0, 1]
    assert ranking.num_missing == 4
    assert rank(jobs, {"job-0": reports["job-0"], "job-3": reports["job-3"]}) == []
    jobs[0] = dataclasses.replace(jobs[0], report_path=None)
    assert rank(jobs, reports) == []


def test_a_likelihood_that_is_no_number_ranks_nothing(records):
    jobs = records(RUN.format(1), RUN.format(2), RUN.format(3))
    reports = {name: report_of(check_of(nll)) for name, nll in (("job-0", 2.0), ("job-1", 1.0), ("job-2", 3.0))}
    broken = reports["job-1"].behaviour[0].model_copy(update={"merged_nll": math.nan})
    reports["job-1"] = reports["job-1"].model_copy(update={"behaviour": (broken,)})
    (ranking,) = rank(jobs, reports)
    assert [row.step for row in ranking.rows] == [1, 3]


@pytest.mark.parametrize(
    ("adapters", "runs"),
    [
        (["/runs/x/checkpoint-1", "/runs/x/checkpoint-2"], ["/runs/x/checkpoint-*"]),
        (["/runs/x/checkpoint-1", "/runs/y/checkpoint-2"], []),
        (["/runs/x/checkpoint-1", "/runs/x/checkpoint-1"], []),
        (["s3://bucket/x/step_10", "s3://bucket/x/step_20"], ["s3://bucket/x/step_*"]),
        (["hf://o/n/checkpoint-1@v1", "hf://o/n/checkpoint-2@v1"], ["hf://o/n/checkpoint-*@v1"]),
        (["hf://o/n@checkpoint-1", "hf://o/n@checkpoint-2"], []),
        (["/r/checkpoint-1/policy", "/r/checkpoint-2/policy", "/r/checkpoint-2/critic"], ["/r/checkpoint-*/policy"]),
        (["/adapters/customer-1", "/adapters/customer-2"], []),
        (["/checkpoint-1/a/b/c", "/checkpoint-2/a/b/c"], []),
        (["/x/epoch_0", "/x/epoch_1", "/y/global_step5", "/y/global_step7"], ["/x/epoch_*", "/y/global_step*"]),
    ],
)
def test_runs_are_told_by_the_names_of_their_checkpoints(records, adapters, runs):
    jobs = records(*adapters)
    found = rank(jobs, {record.id: report_of(check_of(1.0)) for record in jobs})
    assert [ranking.run for ranking in found] == runs


def test_what_is_merged_or_asked_otherwise_is_not_compared(records):
    jobs = records(RUN.format(1), RUN.format(2), RUN.format(3), RUN.format(4))
    asked = {"base_quantization": "none"}, {"parity": {"prompts": ["x"]}}, {"base": "/other"}
    for number, fields in enumerate(asked):
        request = MergeRequest.model_validate(jobs[number].request.model_dump(by_alias=True) | fields)
        jobs[number] = dataclasses.replace(jobs[number], request=request)
    assert rank(jobs, {record.id: report_of(check_of(1.0)) for record in jobs}) == []


def test_each_form_of_the_releases_has_a_ranking_of_its_own(records):
    """What quantizing takes of a step is no reason to prefer another one."""
    jobs = records(*(RUN.format(step) for step in (1, 1, 2, 2)))
    for number in (1, 3):
        fields = jobs[number].request.model_dump(by_alias=True) | {"output": "mxfp4"}
        jobs[number] = dataclasses.replace(jobs[number], request=MergeRequest.model_validate(fields))
    found = rank(jobs, {record.id: report_of(check_of(1.0)) for record in jobs})
    assert [(ranking.output, [row.step for row in ranking.rows]) for ranking in found] == [
        ("16bit", [1, 2]),
        ("mxfp4", [1, 2]),
    ]


def test_the_page_ranks_where_reports_are_and_links_to_them(tmp_path):
    store = JobStore(f"sqlite:///{tmp_path}/jobs.db")
    reports = tmp_path / "reports"
    requests = [
        MergeRequest(id=f"job-{step}", base="/b", adapter=f"/runs/<x>/checkpoint-{step}", destination=f"/out/{step}")
        for step in (1, 2, 3)
    ]
    store.submit(requests, "b")
    for lease in store.claim("driver", 9, 60):
        step = lease.job_id.removeprefix("job-")
        (reports / lease.job_id).mkdir(parents=True)
        report = report_of(check_of(1.0 / int(step))).model_dump_json(by_alias=True)
        (reports / lease.job_id / REPORT_NAME).write_text(report if step != "2" else "{")
        begin(store, lease.job_id, lease.token)
        advance(store, lease.job_id, lease.token, JobState.VERIFYING)
        store.await_approval(lease.job_id, lease.token, "a" * 64, str(reports / lease.job_id), {})
    write_report(store, Selection(batch="b"), "b", tmp_path / "page.html", reports)
    page = (tmp_path / "page.html").read_text()
    table = page.partition("Which step is best")[2].partition("</table>")[0]
    assert table.index("0.3333") < table.index("1.0000")
    assert "job-2" not in table
    assert "Left out: 1 job of this run" in table
    assert "/runs/&lt;x&gt;/checkpoint-*" in table
    assert f'href="file://{reports}/job-3/parity.html"' in table
    assert "<small>AWAITING_APPROVAL</small>" in table or "<small>awaiting_approval</small>" in table
    write_report(store, Selection(batch="b"), "b", tmp_path / "page.html", tmp_path / "elsewhere")
    assert "Which step is best" not in (tmp_path / "page.html").read_text()
    store.close()
