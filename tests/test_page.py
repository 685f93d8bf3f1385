"""index.html, the page about a run, as a browser would read it."""

import time
from dataclasses import asdict
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

import train as train_script
from helpers import make_trainer, train_here
from onenight.distributed import Ranks
from onenight.page import write_page
from onenight.plan import Plan
from onenight.records import Records
from onenight.schedule import Clock

NOW = time.mktime((2030, 3, 1, 22, 15, 0, 0, 0, -1))  # a Friday
PLAN = Plan(
    tokens_per_s=55_700.4,
    eval_s=60.0,
    iters=45,
    tokens=23_040,
    seconds=5 * 3600.0,
    peak_memory_gb=8.04,
)


class Page(HTMLParser):
    """A page: its tags with their attributes, the rows of its tables, and its text by tag."""

    def __init__(self, path):
        super().__init__()
        self.tags = []
        self.rows = []
        self.text = []
        self.inside = ""
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.inside in ("th", "td"):
            self.rows[-1][-1] += data.strip()
        if data.strip():
            self.text.append((self.inside, data.strip()))

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def texts(self, tag):
        return [text for name, text in self.text if name == tag]

    @property
    def cells(self):
        """The cells of the row that each first cell names."""
        return {name: cells for name, *cells in self.rows}

    @property
    def reloads(self):
        return any(meta.get("http-equiv") == "refresh" for meta in self.attributes("meta"))


def make_run(bins, out_dir, **changes):
    """Return what the page is about: a run whose clock stands still two hours after its start."""
    trainer = make_trainer(bins, out_dir=str(out_dir), **changes)
    clock = Clock(trainer.config, Ranks(), now=lambda: 7200.0)
    clock.started = 0.0
    return SimpleNamespace(
        trainer=trainer,
        clock=clock,
        records=Records(trainer.config, wandb_id=""),
        path=out_dir / "index.html",
    )


@pytest.fixture
def run(bins, tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: NOW)
    return make_run(bins, tmp_path / "out")


def page_of(run, ending=""):
    write_page(run.records, run.trainer, run.clock, PLAN, ending)
    return Page(run.path)


def test_the_plan_stands_beside_the_run(run):
    run.trainer.progress.iter_num = 20
    run.trainer.progress.tokens = 10_240
    run.clock.eval_s = 60.0
    for _ in range(3):
        run.clock.add_iteration(240.0)
    for record in (
        {"iter": 18, "train_loss": 5.0, "tokens_per_s": 48_000},
        {"iter": 19, "train_loss": 5.0, "tokens_per_s": 50_000, "peak_memory_gb": 8.44},
        {"iter": 20, "train_loss": 5.0, "peak_memory_gb": 8.31},
    ):
        run.records.write(record)
    cells = page_of(run).cells
    assert cells["speed"] == ["55,700 tokens/s", "50,000 tokens/s"]
    assert cells["peak memory"] == ["8.0 GB", "8.4 GB"]
    assert cells["time"] == ["5h 00m", "2h 00m"]
    # 25 iterations of four minutes and two evaluations of one minute are left: 1h 42m.
    assert cells["done at"] == ["Sat 02 Mar 01:15", "Fri 01 Mar 23:57, in 1h 42m"]
    assert cells["iterations"] == ["45", "20"]
    assert cells["tokens"] == ["23,040", "10,240"]
    assert page_of(run, "done").cells["done at"][1] == "Fri 01 Mar 22:15"


def loss_of(page):
    return page.texts("p")[1]


def test_the_last_loss_and_the_lowest_are_named(run):
    assert "no evaluation" in loss_of(page_of(run))
    run.records.write({"iter": 20, "val_loss": 4.0})
    run.records.write({"iter": 40, "val_loss": 5.0})
    text = loss_of(page_of(run))
    assert text.index("5.0000 at iteration 40") < text.index("4.0000 at iteration 20")


@pytest.mark.parametrize("loss, words", [(4.0, "0.72 above 3.28"), (3.25, "0.03 below 3.28")])
def test_the_reference_is_named_once_the_lowest_loss_is_near(loss, words, bins, tmp_path):
    run = make_run(bins, tmp_path, reference_loss=3.28, reference_label="GPT-2 <124M>")
    run.records.write({"iter": 0, "val_loss": 11.0})
    assert "GPT-2" not in loss_of(page_of(run))
    run.records.write({"iter": 20, "val_loss": loss})
    run.records.write({"iter": 40, "val_loss": 4.2})
    assert f"{words}, GPT-2 <124M>" in loss_of(page_of(run))


def test_the_samples_are_text_and_the_newest_is_first(run):
    run.records.write({"iter": 0, "val_loss": 10.8, "sample": "first: Grüße 😀"})
    run.records.write({"iter": 1000, "val_loss": 4.5, "sample": '<script>alert("&amp;")</script>'})
    run.records.write({"iter": 2000, "sample": "its val loss was not a number"})
    page = page_of(run)
    assert page.texts("h3") == [
        "iteration 2,000",
        "iteration 1,000, val loss 4.5000",
        "iteration 0, val loss 10.8000",
    ]
    shown = page.texts("p")
    assert shown.index('<script>alert("&amp;")</script>') < shown.index("first: Grüße 😀")
    assert page.attributes("script") == []


def test_all_settings_are_listed(run):
    cells = page_of(run).cells
    for key, value in asdict(run.trainer.config).items():
        assert cells[key] == [str(value)]


def test_the_page_loads_only_the_picture_beside_it_and_each_new_one(run):
    run.trainer.progress.iter_num = 20
    assert page_of(run).attributes("img") == []  # none is drawn before the first evaluation
    run.path.with_name("loss.png").touch()
    page = page_of(run)
    assert [image["src"] for image in page.attributes("img")] == ["loss.png?iter=20"]
    assert "//" not in page.html
    assert page.attributes("script") == []


def test_a_page_that_cannot_be_written_is_one_line(run, capsys):
    run.path.mkdir(parents=True)
    for _ in range(2):
        write_page(run.records, run.trainer, run.clock, PLAN, "")
    (line,) = capsys.readouterr().out.splitlines()
    assert "index.html" in line


# -----------------------------------------------------------------------------
# In whole runs


def test_a_run_writes_a_page_at_its_start_at_each_evaluation_and_at_its_end(
    bins, tmp_path, monkeypatch
):
    pages = []

    def write_and_read(*arguments):
        write_page(*arguments)
        pages.append(Page(tmp_path / "index.html"))

    monkeypatch.setattr(train_script, "write_page", write_and_read)
    result = train_here(bins, tmp_path, max_iters=5, eval_interval=2, eval_tokens=512)
    assert result.returncode == 0, result.stderr
    assert pages[0].attributes("img") == []  # there is no evaluation yet
    shown = [page.attributes("img")[0]["src"].partition("=")[2] for page in pages[1:]]
    assert shown == ["0", "2", "4", "5", "5"]
    assert [page.reloads for page in pages] == [True] * 5 + [False]
    assert "running" in pages[0].texts("p")[0]
    assert pages[-1].texts("p")[0] == "done"
    assert pages[-1].cells["iterations"] == ["5", "5"]


def test_the_page_of_a_run_that_fails_does_not_reload_itself(bins, tmp_path, monkeypatch):
    monkeypatch.setattr("onenight.trainer.Trainer.accumulate", lambda trainer: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_here(bins, tmp_path, eval_tokens=512)
    page = Page(tmp_path / "index.html")
    assert "error" in page.texts("p")[0]
    assert not page.reloads
