"""The page of a batch: what it says, what it escapes, and that it stays small and quick with many jobs."""

import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from cluster.commands.report import write_report
from cluster.console.attempts import Attempt, Outcome
from cluster.console.lanes import timeline
from cluster.console.spreads import Figure, spread
from jobs.errors import BadInputError, FailureClass
from jobs.ledger.selection import Selection
from jobs.states import JobState
from tests.nights import BATCH, Night, spend

EVIL = "<script>alert(1)</script>\"'&<b>\x1b[31m"


class Page(HTMLParser):
    """What is on a page: elements in their nesting, attributes, text, hover texts."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.titles, self.attributes = [], Counter(), [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open and self.open[-1] != "style":
            (self.titles if self.open[-1] == "title" else self.texts).append(data.strip())

    @property
    def text(self):
        return " ".join(self.texts)


@pytest.fixture
def night(tmp_path):
    it = Night(tmp_path, num_workers=2)
    yield it
    it.store.close()


def page_of(night, tmp_path):
    path, num_jobs = write_report(night.store, Selection(batch=BATCH), BATCH, tmp_path / "page.html", tmp_path)
    assert num_jobs == len(night.store.jobs())
    return Page(path.read_text())


def test_a_night_is_told_as_the_ledger_has_it(night, tmp_path):
    spend(night, 96)
    counts = night.store.counts()
    page = page_of(night, tmp_path)
    assert counts[JobState.FAILED] == 4
    assert "92 of 96 published, 4 need a person" in page.text
    begun = sum(event.state is JobState.PLANNING for job in night.store.jobs() for event in night.store.events(job.id))
    bars = [title for title in page.titles if re.match(r"job-\d+  \d\d:\d\d:\d\d to", title)]
    assert len(bars) == begun
    assert sum("expected rank 8" in title for title in bars) == 3
    assert "1 job parity_failed" in page.text
    assert "nothing was published: its parity report names" in page.text
    assert sum(title.startswith("s3://releases at fault") for title in page.titles) == 1
    assert {"merge-worker-0", "merge-worker-1"} <= set(page.texts)
    for title in ("Worst rounding", "Mean KL divergence", "Top-1 agreement", "Least survival of a delta"):
        assert title in page.texts
    links = [value for name, value in page.attributes if name == "href"]
    assert "file:///reports/job-00000/parity.html" in links
    assert "s3://releases/job-0" in links


def test_the_page_is_by_itself(night, tmp_path):
    spend(night, 12)
    page = page_of(night, tmp_path)
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object"}
    assert not [name for name, _ in page.attributes if name in {"src", "xlink:href", "onload", "onclick"}]
    styles = re.findall(r"url\(([^)]*)\)", (tmp_path / "page.html").read_text())
    assert set(styles) == {"#hatch"}


def test_text_from_outside_is_escaped(night, tmp_path):
    night.submit(2)
    worker, leases = night.pass_of()
    night.work(worker, leases)
    for each in leases:
        night.fail(each, FailureClass.BAD_INPUT, EVIL)
    page = page_of(night, tmp_path)
    assert not page.tags["script"]
    visible = EVIL.replace("\x1b", "\\x1b")
    assert visible in page.text
    assert any(title.endswith(visible) for title in page.titles)


def test_a_batch_of_which_nothing_has_begun_has_a_page(night, tmp_path):
    night.submit(3)
    page = page_of(night, tmp_path)
    assert "0 of 3 published, 3 waiting" in page.text
    assert "Who was at what, when" not in page.texts


def test_a_page_that_cannot_be_written_leaves_nothing(night, tmp_path):
    night.submit(1)
    with pytest.raises(BadInputError, match="--to: cannot write"):
        write_report(night.store, Selection(batch=BATCH), BATCH, tmp_path / "missing" / "page.html", tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(BadInputError, match="--to: cannot write"):
        write_report(night.store, Selection(batch=BATCH), BATCH, tmp_path / "there", tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def attempt(number, *, worker=0, node=0, outcome=Outcome.PUBLISHED, begin=0.0, seconds=10.0):
    return Attempt(
        job_id=f"job-{number}",
        worker=f"merge-worker-{worker}",
        node=f"node-{node}",
        begin=begin,
        end=begin + seconds,
        outcome=outcome,
        words="",
    )


def test_jobs_of_one_pass_lie_below_each_other_and_follow_each_other_in_time():
    passes = [attempt(number, begin=10.0 * (number // 4)) for number in range(8)]
    (lane,) = timeline(passes, ()).lanes
    places = Counter((box.x, box.y) for box in lane.boxes)
    assert len(places) == 8
    assert len({y for _, y in places}) == 4


def test_many_attempts_are_summed_up_and_each_failure_stays_to_be_seen():
    many = [
        attempt(number, worker=number % 100, node=number % 60, begin=float(number // 100)) for number in range(9_999)
    ]
    picture = timeline([*many, attempt(9_999, begin=50.0, outcome=Outcome.FAILED, seconds=0.01)], ())
    assert picture.is_summed
    assert len(picture.lanes) <= 48
    boxes = [box for lane in picture.lanes for box in lane.boxes]
    assert len(boxes) < 12_000
    failed = [box for box in boxes if box.kind == "failed"]
    assert len(failed) == 1
    assert failed[0].height >= 4.0
    assert "1 failed (job-9999)" in failed[0].words
    ended = sum(
        int(found) for box in boxes if box.kind == "published" for found in re.findall(r"(\d+) published", box.words)
    )
    assert ended == 9_999
    for lane in picture.lanes:
        assert all(lane.y <= box.y and box.y + box.height <= lane.y + lane.height for box in lane.boxes)


def test_a_spread_counts_every_release_and_names_the_worst():
    values = [(f"job-{number}", 10.0**-number) for number in range(1, 7)] + [("zero", 0.0), ("endless", 1e300)]
    found = spread(Figure(title="KL", note="", values=values, limit=5e-3, is_log=True))
    assert sum(int(box.words.split()[0]) for box in found.boxes) == 8
    assert found.worst[0] == "endless"
    assert spread(Figure(title="x", note="", values=[("a", 1.0)] * 5, limit=None)).boxes[0].words.startswith("5 of 5")
    assert spread(Figure(title="x", note="", values=[], limit=1.0)) is None


@pytest.mark.slow
def test_ten_thousand_jobs_take_megabytes(tmp_path):
    night = Night(tmp_path, num_workers=64)
    spend(night, 10_000)
    path, _ = write_report(night.store, Selection(batch=BATCH), BATCH, tmp_path / "page.html", tmp_path)
    assert path.stat().st_size < 10_000_000
    night.store.close()
