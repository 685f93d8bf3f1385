"""optimizer.py: parameter groups, updates and schedules; and train.py with Muon."""

import math
import re

from onenight.optimizer import make_optimizers, schedule
from onenight.train_config import TrainConfig

import pytest
import torch
from conftest import load, metrics, train_here

from model import GPT, GPTConfig

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}
MUON = {
    "architecture": "qwen3", "optimizer": "muon", "learning_rate": 0.02, "embedding_lr": 0.3, "head_lr": 0.004,
    "vector_lr": 0.01,
}  # fmt: skip


def make(**settings):
    config = TrainConfig(**SHAPE, **settings)
    model = GPT(GPTConfig(**config.shape, vocab_size=64))
    return model, make_optimizers(model, config, torch.device("cpu"))


def groups_by_name(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    return [({names[id(p)] for p in group["params"]}, group) for group in optimizer.param_groups]


# ---- who has what


def test_adamw_decays_the_matrices_and_not_the_vectors():
    model, optimizers = make(bias=True, weight_decay=0.3, learning_rate=3e-4, beta1=0.8, beta2=0.99)
    assert optimizers.keys() == {"optimizer"}
    (matrices, decayed), (vectors, kept) = groups_by_name(model, optimizers["optimizer"])
    assert vectors == {name for name, p in model.named_parameters() if ".ln_" in name or name.endswith(".bias")}
    assert matrices == {name for name, _ in model.named_parameters()} - vectors
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert {(group["lr"], group["betas"]) for group in (decayed, kept)} == {(3e-4, (0.8, 0.99))}


def test_muon_updates_the_blocks_matrices_and_adamw_the_rest():
    model, optimizers = make(**MUON, weight_decay=0.05)
    ((matrices, muon),) = groups_by_name(model, optimizers["muon"])
    assert matrices == {name for name, p in model.named_parameters() if ".h." in name and p.dim() == 2}
    assert (muon["lr"], muon["weight_decay"], muon["momentum"], muon["nesterov"]) == (0.02, 0.05, 0.95, True)
    (gains, third), (embeddings, first), (head, second) = groups_by_name(model, optimizers["optimizer"])
    assert (gains, third["lr"]) == ({name for name, p in model.named_parameters() if p.dim() == 1}, 0.01)
    assert third["weight_decay"] == 0.0
    assert (embeddings, first["lr"], first["weight_decay"]) == ({"transformer.wte.weight"}, 0.3, 0.0)
    assert (head, second["lr"], second["weight_decay"]) == ({"lm_head.weight"}, 0.004, 0.0)


def test_with_muon_adamw_updates_gpt2s_embeddings_and_vectors():
    model, optimizers = make(**{**MUON, "architecture": "gpt2", "head_lr": 0.0})
    ((matrices, _),) = groups_by_name(model, optimizers["muon"])
    (vectors, _), (embeddings, _) = groups_by_name(model, optimizers["optimizer"])
    assert embeddings == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert vectors == {name for name, _ in model.named_parameters() if ".ln_" in name}
    assert matrices | vectors | embeddings == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("shape", [(96, 32), (32, 32), (128, 32)])
def test_muons_update_is_orthogonal(shape):
    """Muon's property: all singular values of an update are alike, whatever those of the gradient are."""
    torch.manual_seed(0)
    model, optimizers = make(**MUON, weight_decay=0.0)
    parameter = next(p for p in model.transformer.h.parameters() if p.shape == shape)
    before = parameter.detach().clone()
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    parameter.grad = u @ torch.diag(torch.logspace(0, -2, len(s))) @ v
    optimizers["muon"].step()
    moved = torch.linalg.svdvals(parameter.detach() - before) / (0.02 * math.sqrt(max(1, shape[0] / shape[1])))
    # five Newton-Schulz steps bring a hundredfold spread to between 0.5 and 1.5 (Muon's author)
    assert moved.min() > 0.5 and moved.max() < 1.5


# ---- when


def test_the_cosine_is_nanogpts():
    config = TrainConfig(learning_rate=6e-4, min_lr=6e-5, warmup_iters=10, lr_decay_iters=110)
    assert schedule(config, 0) == pytest.approx(1 / 11)
    assert schedule(config, 9) == pytest.approx(10 / 11)
    for done in (0.0, 0.25, 0.5, 1.0):
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        assert 6e-4 * schedule(config, 10 + int(100 * done)) == pytest.approx(6e-5 + cosine * (6e-4 - 6e-5))
    assert schedule(config, 1000) == pytest.approx(0.1)


def test_the_trapezoid():
    config = TrainConfig(learning_rate=0.02, min_lr=0.002, warmup_iters=10, warmdown_iters=70, lr_decay_iters=100)
    shares = [schedule(config, i) for i in (0, 10, 30, 65, 100, 200)]
    assert shares == pytest.approx([1 / 11, 1.0, 1.0, 0.55, 0.1, 0.1])


def test_without_decay_the_rate_is_constant():
    assert {schedule(TrainConfig(decay_lr=False, warmdown_iters=5), i) for i in (0, 5, 10**6)} == {1.0}


# ---- a run


@pytest.fixture(scope="module")
def muon_run(bins, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("muon")
    return out_dir, train_here(bins, out_dir, **MUON, warmdown_iters=30, min_lr=0.0)


def test_muon_learns_and_logs_the_rate_of_each_group(muon_run):
    out_dir, result = muon_run
    assert result.returncode == 0, result.stderr
    records = metrics(out_dir)
    assert [r["train_loss"] for r in records if "train_loss" in r][-1] < 4  # the uniform guess has 5.5
    assert all(r["lr_embedding"] == pytest.approx(15 * r["lr"]) for r in records)
    assert all(r["lr_head"] == pytest.approx(0.2 * r["lr"]) for r in records)
    assert all(r["lr_vectors"] == pytest.approx(0.5 * r["lr"]) for r in records)
    assert [r["lr"] for r in records if r["iter"] == 10][0] == pytest.approx(0.02)
    assert records[-1]["lr"] == 0


def test_muon_resumes_bit_for_bit(muon_run, bins, tmp_path):
    """Stopped in the middle by max_iters and resumed, it equals the undisturbed run."""
    settings = {**MUON, "warmdown_iters": 30, "min_lr": 0.0}
    assert train_here(bins, tmp_path, **settings, max_iters=20).returncode == 0
    resumed = train_here(bins, tmp_path, **settings, init_from="resume")
    assert resumed.returncode == 0, resumed.stderr
    first, second = load(muon_run[0]), load(tmp_path)
    assert first["model_args"]["architecture"] == "qwen3"
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for optimizer in ("optimizer", "muon"):
        for number, state in first[optimizer]["state"].items():
            for name, value in state.items():
                assert torch.equal(value, second[optimizer]["state"][number][name]), (optimizer, number, name)


def test_a_rate_changed_at_a_resume_is_used(bins, tmp_path):
    """The settings have priority over the checkpoint."""
    assert train_here(bins, tmp_path, max_iters=20, weight_decay=0.0).returncode == 0
    before = load(tmp_path)["model"]
    changes = {"learning_rate": 1e-9, "min_lr": 0.0, "weight_decay": 1e8, "max_iters": 21, "decay_lr": False}
    resumed = train_here(bins, tmp_path, init_from="resume", **changes)
    assert "changed since: weight_decay 0.0 -> 100000000.0" in resumed.stdout
    after = load(tmp_path)["model"]
    name = "transformer.h.0.mlp.c_fc.weight"
    # the rate itself moves nothing, and a tenth of the weight decays: 1e-9 * 1e8
    torch.testing.assert_close(after[name], 0.9 * before[name], rtol=1e-4, atol=1e-6)


def test_another_architecture_is_not_resumed(muon_run, bins):
    refused = train_here(bins, muon_run[0], init_from="resume")
    assert refused.returncode != 0
    assert "architecture=qwen3" in refused.stderr


def test_muon_needs_the_rates_of_the_others(bins, tmp_path):
    refused = train_here(bins, tmp_path, architecture="qwen3", optimizer="muon", embedding_lr=0.3)
    assert refused.returncode != 0
    assert re.search("embedding_lr and head_lr", refused.stderr)
