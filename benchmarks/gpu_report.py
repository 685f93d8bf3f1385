"""What benchmarks/gpu.py writes: the figures as JSON, and as a table."""

from pathlib import Path

import common  # noqa: F401  (puts the project on the path)
from onenight.system.files import make_folder, replacing
from onenight.system.json_files import write_json

# The figures that a line of the table contains, in this order, and how they are printed.
WORDS = {
    "batch_size": "micro-batch {}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "mfu": "MFU {:.0%}",
    "gain": "{:+.1%}",
    "allocated_gb": "peak {:.2f} GB",
    "plan_gb": "planned {:.2f} GB",
    "reserved_gb": "reserved {:.2f} GB",
    "compile_s": "compiled in {:.0f} s",
    "share_of_copying_speed": "{:.0%} of the copying speed",
    "difference": "at most {:.1g} from the exact ones",
    "note": "{}",
    "times": "{:.2f} times",
    "matmul_tflops": "{:.2f} TFLOP/s",
    "copy_gb_s": "{:,.0f} GB/s read and written",
    "limit_gb": "limited to {:.2f} GB",
    "went_on_with": "continued with micro-batch {}",
    "loss_difference": "at most {:.1g} apart",
    "iters": "in {} iterations",
    "differs_from": "the first at iteration {}",
    "save_s": "{:.2f} s",
    "saved_gb": "{:.2f} GB on disk",
    "skipped": "{}",
    "failed": "failed: {}",
}
TABLE_HEAD = "| part | measured | result |\n|---|---|---|\n"


class Report:
    """The figures as JSON, and as a table beside it. Both files are written anew with every line,
    which is also printed."""

    def __init__(self, path: Path, about: dict):
        make_folder(path.parent)
        self.path = path
        self.about = about
        self.parts = {}
        self.text = f"{describe_machine(about)}\n{TABLE_HEAD}"
        print(
            f"The figures go to {path}, and this table beside it; please open an issue with them."
            f"\n\n{self.text}",
            end="",
            flush=True,
        )

    def add(self, part: str, name: str, figures: dict):
        """Add the figures of a measurement."""
        self.parts.setdefault(part, {})[name] = figures
        write_json(self.path, {**self.about, "parts": self.parts})

        line = f"| {part} | {name} | {describe(figures)} |\n"
        self.text += line
        with replacing(self.path.with_suffix(".md"), "w") as file:
            file.write(self.text)
        print(line, end="", flush=True)


def describe_machine(about: dict) -> str:
    """Return the lines above the table."""
    title = about["machine"]
    if about["tiny"]:
        title = "Tiny models on a CPU, which only show that the parts work"
    versions = [f"torch {about['torch']}"]
    for key in ("cuda", "driver"):
        if key in about:
            versions.append(f"{key} {about[key]}")
    versions += [f"commit {about['commit']}", about["date"]]
    return f"# {title}\n\n{', '.join(versions)}\n"


def describe(figures: dict) -> str:
    """Return the figures of a measurement in words."""
    words = [text.format(figures[key]) for key, text in WORDS.items() if key in figures]
    return ", ".join(words).replace("|", "/")  # which would be a column of the table
