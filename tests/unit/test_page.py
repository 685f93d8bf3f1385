"""page.py: index.html, the page about a run, as a browser would read it."""

import time
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest

from helpers import make_run, make_trainer, train_here
from onenight.system.distributed import Ranks
from onenight.training.page import write_page

NOW = time.mktime((2030, 3, 1, 22, 15, 0, 0, 0, -1))  # a Friday


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


@pytest.fixture
def run(bins, tmp_path):
    """A run whose clock stands still two hours after its start."""
    run = make_run(make_trainer(bins), tmp_path / "out", now=lambda: 0.0)
    run.clock.wall = lambda: NOW
    run.clock.earlier_s = 7200.0
    return run


def page_of(run, ending=""):
    write_page(run, ending)
    return Page(run.out_dir / "index.html")


def test_a_page_reloads_itself_until_the_run_has_ended(run):
    during = page_of(run)
    assert during.reloads
    assert "running, at iteration 0" in during.texts("p")
    after = page_of(run, "stopped at iter 20")
    assert not after.reloads
    assert "stopped at iter 20" in after.texts("p")


def test_the_samples_are_text_and_the_newest_is_first(run):
    run.metrics.write({"iter": 0, "val_loss": 10.8, "sample": "first"})
    run.metrics.write({"iter": 1000, "val_loss": 4.5, "sample": '<script>alert("&amp;")</script>'})
    run.metrics.write({"iter": 2000, "sample": "the val loss was not a number"})
    page = page_of(run)
    assert page.texts("h3") == [
        "iteration 2,000",
        "iteration 1,000, val loss 4.5000",
        "iteration 0, val loss 10.8000",
    ]
    shown = page.texts("p")
    assert shown.index('<script>alert("&amp;")</script>') < shown.index("first")
    assert page.attributes("script") == []


def test_a_sample_that_utf_8_cannot_encode_is_shown(run):
    run.metrics.write({"iter": 0, "val_loss": 10.8, "sample": "Grüße \ud83d 😀"})
    assert "Grüße ? 😀" in page_of(run).texts("p")


def test_the_plan_stands_beside_the_run(run):
    run.plan = replace(
        run.plan, tokens_per_s=55_700.4, iters=45, tokens=23_040, seconds=5 * 3600.0,
        memory={"weights": 8e9},
    )  # fmt: skip
    run.progress.iter_num = 20
    run.progress.tokens = 10_240
    run.metrics.write({"iter": 18, "train_loss": 5.0, "tokens_per_s": 48_000})
    run.metrics.write(
        {"iter": 19, "train_loss": 5.0, "tokens_per_s": 50_000, "peak_memory_gb": 8.44}
    )
    run.metrics.write({"iter": 20, "train_loss": 5.0, "peak_memory_gb": 8.4})
    assert page_of(run).cells["done at"] == ["Sat 02 Mar 01:15", "not known yet"]

    # 25 iterations of four minutes and two evaluations of one minute are left: 1h 42m.
    run.progress.evaluated_iter = 20
    for _ in range(3):
        run.clock.add_iteration(240.0)
        run.clock.add_evaluation(60.0)
    cells = page_of(run).cells
    assert cells[""] == ["plan", "run so far"]
    assert cells["speed"] == ["55,700 tokens/s", "50,000 tokens/s"]
    assert cells["peak memory"] == ["8.0 GB", "8.4 GB"]
    assert cells["time"] == ["5h 00m plus evaluation", "2h 00m"]
    assert cells["done at"] == ["Sat 02 Mar 01:15", "Fri 01 Mar 23:57, in 1h 42m"]
    assert cells["iterations"] == ["45", "20"]
    assert cells["tokens"] == ["23,040", "10,240"]


def test_a_run_that_has_ended_says_when(run):
    stopped = page_of(run, "stopped at iter 20").cells
    assert stopped[""] == ["plan", "run"]
    assert stopped["done at"][1] == "stopped Fri 01 Mar 22:15"
    run.progress.iter_num = 45
    assert page_of(run, "done").cells["done at"][1] == "Fri 01 Mar 22:15"


def test_the_plan_of_a_run_with_several_processes_is_for_one(run):
    run.trainer.ranks = Ranks(world_size=4)
    assert page_of(run).cells[""][0] == "plan for one process"


def test_the_last_loss_and_the_lowest_are_named(run):
    assert "no evaluation yet" in page_of(run).texts("p")
    run.metrics.write({"iter": 20, "val_loss": 4.0})
    assert "val loss 4.0000 at iteration 20, the lowest of the run" in page_of(run).texts("p")
    run.metrics.write({"iter": 40, "val_loss": 5.0})
    words = "val loss 5.0000 at iteration 40; the lowest was 4.0000 at iteration 20"
    assert words in page_of(run).texts("p")


def test_all_settings_are_listed(run):
    cells = page_of(run).cells
    for key, value in asdict(run.config).items():
        assert cells[key] == [str(value)]


def test_the_page_loads_only_the_picture_beside_it(run):
    assert page_of(run).attributes("img") == []
    (run.out_dir / "loss.png").write_bytes(b"")
    run.progress.iter_num = 20
    page = page_of(run)
    (image,) = page.attributes("img")
    assert image["src"] == "loss.png?iter=20"
    assert "//" not in page.html
    assert page.attributes("script") == []


def test_the_name_of_a_folder_is_text(bins, tmp_path):
    run = make_run(make_trainer(bins), tmp_path / "<b>&amp;")
    assert page_of(run).texts("h1") == ["<b>&amp;"]


def test_a_page_that_cannot_be_written_is_one_line(run, capsys):
    (run.out_dir / "index.html").mkdir()
    for _ in range(2):
        write_page(run)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("index.html: cannot be written (")


def test_only_the_first_process_writes_a_page(bins, tmp_path):
    write_page(make_run(make_trainer(bins, ranks=Ranks(rank=1)), tmp_path))
    assert list(tmp_path.iterdir()) == []


# -----------------------------------------------------------------------------
# At the door


def test_a_run_writes_a_page_at_its_start_at_each_evaluation_and_at_its_end(
    bins, tmp_path, monkeypatch
):
    pages = []

    def write_and_read(run, ending=""):
        pages.append(page_of(run, ending))

    monkeypatch.setattr("train.write_page", write_and_read)
    assert train_here(bins, tmp_path).returncode == 0
    statuses = [page.texts("p")[0] for page in pages]
    running = [f"running, at iteration {iter_num}" for iter_num in (0, 0, 20, 40, 45)]
    assert statuses == [*running, "done"]
    assert [page.reloads for page in pages] == [True] * 5 + [False]
    assert pages[-1].attributes("img")[0]["src"] == "loss.png?iter=45"


def test_the_page_of_a_resumed_run_has_the_evaluations_before(bins, tmp_path):
    assert train_here(bins, tmp_path, max_iters=20).returncode == 0
    first = Page(tmp_path / "index.html")
    assert first.cells["iterations"] == ["20", "20"]
    assert not first.reloads
    assert train_here(bins, tmp_path, init_from="resume").returncode == 0
    resumed = Page(tmp_path / "index.html")
    assert resumed.cells["iterations"] == ["45", "45"]
    assert resumed.cells["init_from"] == ["resume"]
    assert not resumed.reloads


def test_the_page_of_a_run_that_fails_does_not_reload_itself(bins, tmp_path, monkeypatch):
    monkeypatch.setattr("train.forward_backward", lambda trainer: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_here(bins, tmp_path)
    page = Page(tmp_path / "index.html")
    assert "ended by an error" in page.texts("p")
    assert not page.reloads


def test_a_page_that_cannot_be_written_does_not_end_a_run(bins, tmp_path):
    (tmp_path / "index.html").mkdir()
    result = train_here(bins, tmp_path, max_iters=1)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("index.html: cannot be written (") == 1
