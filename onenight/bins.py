"""
Writing train.bin, val.bin and meta.json, so that an interrupted preparation can be continued.

The bins are nanoGPT's: token ids as little-endian uint16, no header. meta.json records their contents and their
sources. While they are being written their names end in .partial, and prepare.json records how much of them is valid.
"""

import contextlib
import hashlib
import os
from collections import Counter
from pathlib import Path

from onenight.files import read_json, rename, write_json
from onenight.tokenizer import EOT, VOCAB_SIZE

import numpy as np

SPLITS = ("train", "val")
CHUNK = 1 << 23  # tokens read at once
COUNT = range(1 << 60)
STATE = {"rows": COUNT, **{split: {"tokens": COUNT, "documents": COUNT, "sha256": str} for split in SPLITS}}
JOB = {"settings": {}, "sources": [{"file": str}]}
META = {"vocab_size": range(1, 1 + (1 << 16)), **JOB, **STATE}


class BinsWriter:
    """Both splits while they are being written. `state` counts the input rows processed, the tokens and documents of
    each split, and the caller's `counters`. `job` is what determines the contents: settings and sources. Unfinished
    work for the same job is continued. Raises SystemExit if the bins of another would be lost without `overwrite`."""

    def __init__(self, out_dir: Path, job: dict, counters: dict, overwrite: bool):
        self.out_dir, self.job, self.journal = out_dir, job, out_dir / "prepare.json"
        self.state = {"rows": 0, **{split: {"tokens": 0, "documents": 0} for split in SPLITS}, **counters}
        earlier = read_json(self.journal, {"job": JOB, "state": STATE})
        partial = {split: out_dir / f"{split}.bin.partial" for split in SPLITS}
        # Where each split is: the last run may have stopped after renaming it, which it does without a meta.json.
        finished = (out_dir / "meta.json").exists()
        self.paths = {s: path if path.exists() or finished else out_dir / f"{s}.bin" for s, path in partial.items()}
        if earlier.get("job") == job and all(path.exists() for path in self.paths.values()):
            self.state = earlier["state"]
        else:
            if not overwrite and (what := would_lose(out_dir, earlier, job)):
                raise SystemExit(f"{out_dir}: holds {what}; choose another --out_dir, or replace it with --overwrite")
            self.journal.unlink(missing_ok=True)
            self.paths = partial
            for path in partial.values():
                path.write_bytes(b"")
        self.files = {split: open(path, "r+b", buffering=1 << 20) for split, path in self.paths.items()}
        for split, file in self.files.items():
            file.truncate(2 * self.state[split]["tokens"])
            file.seek(0, os.SEEK_END)

    @property
    def tokens(self) -> int:
        return sum(self.state[split]["tokens"] for split in SPLITS)

    @property
    def documents(self) -> int:
        return sum(self.state[split]["documents"] for split in SPLITS)

    def write(self, split: str, ids: np.ndarray):
        """Appends the ids of whole documents, each with its end-of-text."""
        self.files[split].write(ids.astype("<u2", copy=False).data)
        self.state[split]["tokens"] += len(ids)
        self.state[split]["documents"] += int((ids == EOT).sum())

    def checkpoint(self):
        """Makes everything written so far survive a power cut."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        write_json(self.journal, {"job": self.job, "state": self.state})

    def close(self):
        for file in self.files.values():
            with contextlib.suppress(OSError):  # a full disk: prepare.json says how much of the file is valid
                file.close()

    def discard(self):
        """Deletes the unfinished work."""
        self.close()
        clear_work(self.out_dir)

    def finish(self, meta: dict) -> Counter:
        """Checks the files on the disk, then renames both bins and writes meta.json last, so that a train.bin never
        stands beside the meta.json of another. Returns the number of documents of each length in tokens."""
        self.checkpoint()
        self.close()
        lengths = Counter()
        for split, path in self.paths.items():
            try:
                found, digest = check_bin(path, **self.state[split])
            except SystemExit:
                self.journal.unlink()  # this work must not be continued
                raise
            lengths += found
            meta[split] = {**self.state[split], "sha256": digest}
        (self.out_dir / "meta.json").unlink(missing_ok=True)
        if self.paths["val"] != self.out_dir / "val.bin":
            (self.out_dir / "val.bin").unlink(missing_ok=True)
        for split, path in self.paths.items():
            rename(path, self.out_dir / f"{split}.bin")
        write_json(self.out_dir / "meta.json", meta | self.job)
        self.journal.unlink()
        return lengths


def would_lose(out_dir: Path, unfinished: dict, job: dict) -> str:
    """The bins in the folder, finished or not, that this job would replace, in words; '' if there are none."""
    if unfinished.get("state", {}).get("rows") and unfinished["job"] != job:
        return f"an unfinished preparation of {differences(unfinished['job'], job)}"
    if any((out_dir / name).exists() for name in ("meta.json", "train.bin", "val.bin")):
        return f"finished bins of {differences(read_meta(out_dir), job)}"
    return ""


def differences(old: dict, new: dict) -> str:
    """What changed between two jobs, as 'other settings (val_fraction 0.005, now 0.01)'."""
    if JOB.keys() - old.keys():
        return "unknown origin"
    before, after = old["settings"], new["settings"]
    changed = [f"{key} {before.get(key)}, now {after[key]}" for key in after if before.get(key) != after[key]]
    if changed:
        return f"other settings ({'; '.join(changed)})"
    files, files_now = (", ".join(source.get("file", "?") for source in job["sources"]) for job in (old, new))
    if files != files_now:
        return f"other files ({files:.100})"
    same = old["sources"] == new["sources"]
    return "other sizes than its meta.json says" if same else f"the same files before they were changed ({files:.100})"


def is_complete(out_dir: Path, job: dict) -> bool:
    """Whether the finished bins of this very job are there, in full size."""
    meta = read_meta(out_dir)
    bins = [(out_dir / f"{split}.bin", 2 * meta.get(split, {}).get("tokens", -1)) for split in SPLITS]
    return meta | job == meta and all(path.exists() and path.stat().st_size == size for path, size in bins)


def clear_work(out_dir: Path):
    """Removes the temporary files of a preparation, but no finished bin."""
    for name in ("prepare.json", "prepare.json.partial", "train.bin.partial", "val.bin.partial"):
        (out_dir / name).unlink(missing_ok=True)


def check_bin(path: Path, tokens: int, documents: int, sha256: str | None = None) -> tuple[Counter, str]:
    """Reads the whole file and returns the number of documents of each length (in tokens, without end-of-text), and the
    sha256. Raises SystemExit if it does not hold `tokens` ids of GPT-2 in `documents` documents."""
    lengths, digest, largest, seen, last_end = Counter(), hashlib.sha256(), 0, 0, -1
    with open(path, "rb") as file:
        while raw := file.read(2 * CHUNK):
            digest.update(raw)
            ids = np.frombuffer(raw[: len(raw) // 2 * 2], "<u2")
            largest = max(largest, int(ids.max(initial=0)))
            ends = np.flatnonzero(ids == EOT) + seen // 2
            lengths.update((np.diff(ends, prepend=last_end) - 1).tolist())
            last_end = ends[-1] if len(ends) else last_end
            seen += len(raw)
    found = {"bytes": seen, "end-of-text tokens": lengths.total(), "largest id": largest, "sha256": digest.hexdigest()}
    expected = {"bytes": 2 * tokens, "end-of-text tokens": documents, "largest id": min(largest, VOCAB_SIZE - 1)}
    expected["sha256"] = sha256 or digest.hexdigest()
    wrong = [f"{key} {found[key]} instead of {expected[key]}" for key in found if found[key] != expected[key]]
    if wrong:
        raise SystemExit(f"{path}: damaged ({', '.join(wrong)}); prepare it again with --overwrite")
    return lengths, digest.hexdigest()


def read_meta(data_dir: Path) -> dict:
    """meta.json; {} if there is none, as in nanoGPT's own data folders. Raises SystemExit if it cannot be read."""
    return read_json(data_dir / "meta.json", META)
