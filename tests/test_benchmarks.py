"""benchmarks/train.py as a process, with a very small peer."""

import json

from conftest import TINY, assert_one_sentence, run

PEER = '''
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    bias: bool
    vocab_size: int
    dropout: float

class GPT(torch.nn.Module):
    """Predicts a token from the one before it; has no room for more than 4 windows."""
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def forward(self, idx, targets):
        if len(idx) > 4:
            raise torch.OutOfMemoryError
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
'''


def bench(bins, **changes):
    settings = {**TINY, "dataset": bins, "rounds": 1, "seconds": 0.2, **changes}
    return run("benchmarks/train.py", *(f"--{key}={value}" for key, value in settings.items()))


def test_both_are_measured_and_the_figures_saved(bins, tmp_path):
    (tmp_path / "model.py").write_text(PEER)
    result = bench(bins, rounds=2, peer=tmp_path, save=tmp_path / "figures.json")
    assert result.returncode == 0, result.stderr
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == [
        "ours",
        "peer",
        "ours",
        "peer",
        "ours / peer",
    ]
    saved = json.loads((tmp_path / "figures.json").read_text())
    assert saved.keys() >= {"command", "commit", "date", "machine", "torch", "results", "median_tokens_per_s"}
    for name, batch_size in (("ours", 8), ("peer", 4)):
        for figures in saved["results"][name]:
            assert figures["batch_size"] == batch_size
            assert figures["iterations"] >= 1 and figures["tokens_per_s"] > 0
    assert all(0 <= figures["reading_share"] < 1 for figures in saved["results"]["ours"])
    ours, peer = (saved["median_tokens_per_s"][name] for name in ("ours", "peer"))
    assert f"ours / peer: {ours / peer:.2f} times" in result.stdout


def test_a_measurement_that_fails_is_one_sentence(tmp_path):
    assert_one_sentence(bench(tmp_path / "nowhere"), "no such file")
