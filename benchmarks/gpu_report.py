"""What benchmarks/gpu.py writes: the figures as JSON, and as a table."""

from pathlib import Path

import common  # noqa: F401  (the project's folder is on the path now)
from onenight.files import make_folder, replacing, write_json

# The figures that a line of the table tells, in this order, and their words.
WORDS = {
    "batch_size": "micro-batch {}", "tokens_per_s": "{:,.0f} tokens/s", "mfu": "MFU {:.0%}", "gain": "{:+.1%}",
    "allocated_gb": "peak {:.2f} GB", "plan_gb": "planned {:.2f} GB", "reserved_gb": "reserved {:.2f} GB",
    "compile_s": "compiled in {:.0f} s", "share_of_bandwidth": "{:.0%} of the copying speed", "note": "{}",
    "times": "{:.2f} times", "matmul_tflops": "{:.2f} TFLOP/s", "copy_gb_s": "{:,.0f} GB/s read and written",
    "limit_gb": "limited to {:.2f} GB", "went_on_with": "went on with micro-batch {}",
    "loss_difference": "at most {:.1g} apart", "iters": "in {} iterations", "save_s": "{:.2f} s",
    "saved_gb": "{:.2f} GB on disk", "skipped": "{}", "failed": "failed: {}",
}  # fmt: skip


class Report:
    """The figures as JSON, and as a table beside it, both written anew with every line, which is also printed."""

    def __init__(self, path: Path, about: dict):
        make_folder(path.parent)
        self.path, self.about, self.parts = path, about, {}
        machine = "Tiny models on a CPU, which only show that the parts work" if about["tiny"] else about["machine"]
        versions = [f"torch {about['torch']}", *(f"{key} {about[key]}" for key in ("cuda", "driver") if key in about)]
        self.text = f"# {machine}\n\n{', '.join(versions)}, commit {about['commit']}, {about['date']}\n"
        self.text += "\n| part | measured | result |\n|---|---|---|\n"
        print(f"The figures, to be sent back, go to {path}; this table beside it.\n\n{self.text}", end="", flush=True)

    def add(self, part: str, name: str, figures: dict):
        """Adds the figures of a measurement."""
        self.parts.setdefault(part, {})[name] = figures
        words = ", ".join(text.format(figures[key]) for key, text in WORDS.items() if key in figures)
        line = f"| {part} | {name} | {words.replace('|', '/')} |\n"
        self.text += line
        write_json(self.path, {**self.about, "parts": self.parts})
        with replacing(self.path.with_suffix(".md"), "w") as file:
            file.write(self.text)
        print(line, end="", flush=True)
