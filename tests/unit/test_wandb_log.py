"""onenight/training/wandb_log.py: Weights & Biases with a key, without one, without the package."""

import sys
from types import SimpleNamespace

import pytest

from helpers import train, train_here
from onenight.training.settings import TrainConfig
from onenight.training.wandb_log import start_wandb


class FakeWandb:
    """A package that answers as wandb does with a key and, if it is `online`, a network.

    `options` has those of each run that was started, `records` what was logged.
    """

    Settings = dict

    def __init__(self):
        self.online = True
        self.options = []
        self.records = []

    def login(self, **options):
        return True

    def init(self, **options):
        if options["mode"] == "online" and not self.online:
            raise ConnectionError("no network")
        self.options.append(options)
        url = "https://wandb.ai/me/owt/runs/1" if self.online else None
        return SimpleNamespace(id="1", url=url, log=self.log)

    def log(self, record, step):
        self.records.append((step, record))


@pytest.fixture
def wandb(monkeypatch):
    package = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return package


def test_the_address_of_the_run_is_printed(wandb, tmp_path, capsys):
    run = start_wandb(TrainConfig(), tmp_path, wandb_id="")
    assert run.id == "1"
    assert capsys.readouterr().out == "wandb: https://wandb.ai/me/owt/runs/1\n"
    (options,) = wandb.options
    assert options["mode"] == "online"
    assert options["id"] is None
    assert options["config"]["learning_rate"] == 6e-4


def test_a_resumed_run_continues_the_run_at_wandb(wandb, tmp_path):
    start_wandb(TrainConfig(), tmp_path, wandb_id="1")
    (options,) = wandb.options
    assert options["id"] == "1"
    assert options["resume"] == "allow"


def test_the_mode_of_the_environment_is_kept(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    start_wandb(TrainConfig(), tmp_path, wandb_id="")
    assert wandb.options[0]["mode"] == "disabled"


def test_without_a_network_a_run_logs_offline_what_it_records(wandb, bins, tmp_path):
    wandb.online = False
    result = train_here(bins, tmp_path, wandb_log=True, max_iters=2)
    assert result.returncode == 0, result.stderr
    upload = f"upload {tmp_path / 'wandb'} later with `wandb sync`"
    assert f"wandb: offline (no network); {upload}\n" in result.stdout
    (options,) = wandb.options
    assert options["mode"] == "offline"
    assert options["config"]["dtype"] == "float32"  # what the run uses, not "auto"
    steps = [(step, record) for step, record in wandb.records if "train_loss" in record]
    assert [step for step, _ in steps] == [0, 1]
    assert all(record["grad_norm"] > 0 for _, record in steps)
    assert [step for step, record in wandb.records if "val_loss" in record] == [0, 2]


def test_a_run_without_the_package_trains_without_it(bins, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = train_here(bins, tmp_path, wandb_log=True, max_iters=2)
    assert result.returncode == 0, result.stderr
    assert "wandb: disabled (" in result.stdout
    assert "pip install -U wandb may help" in result.stdout


def test_without_a_key_the_real_package_is_offline_and_a_resumed_run_has_the_same_id(
    bins, tmp_path
):
    out_dir = tmp_path / "out"
    environment = {"HOME": str(tmp_path), "WANDB_API_KEY": None, "WANDB_MODE": None}
    for changes in ({"max_iters": 2}, {"max_iters": 4, "init_from": "resume"}):
        result = train(bins, out_dir, wandb_log=True, env=environment, **changes)
        assert result.returncode == 0, result.stderr
        assert "wandb: offline (there is no API key (wandb login)); upload" in result.stdout
    runs = sorted(path.name for path in (out_dir / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    ids = {name.rsplit("-")[-1] for name in runs}
    assert len(ids) == 1
    assert len(list((out_dir / "wandb").glob("offline-run-*/*.wandb"))) == 2
