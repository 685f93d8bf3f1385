"""Weights & Biases, which is optional: a run continues without the package, a key or a network."""

import os
from dataclasses import asdict
from pathlib import Path

from onenight.system.wording import first_line
from onenight.training.settings import TrainConfig


def start_wandb(config: TrainConfig, out_dir: Path, wandb_id: str):
    """Return a wandb run that records `config`: a new one, or, if resumed, the one with that id.
    Return None, with a message, if that is not possible. Without a key or a network the run is
    offline."""
    try:
        import wandb

        options = {
            "project": config.wandb_project,
            "name": config.wandb_run_name,
            "config": asdict(config),
            "dir": out_dir,
            "id": wandb_id or None,
            "resume": "allow",
            "settings": wandb.Settings(init_timeout=30, silent=True),
        }
        mode = os.environ.get("WANDB_MODE") or "online"
        try:
            if mode == "online" and not wandb.login(prompt=False, verify=False):
                raise PermissionError("there is no API key (wandb login)")
            run = wandb.init(**options, mode=mode)
        except Exception as error:
            run = wandb.init(**options, mode="offline")
            print(
                f"wandb: offline ({first_line(error)}); "
                f"upload {out_dir / 'wandb'} later with `wandb sync`"
            )
    except Exception as error:
        print(f"wandb: disabled ({first_line(error)}); pip install -U wandb may help")
        return None
    if run.url:
        print(f"wandb: {run.url}")
    return run
