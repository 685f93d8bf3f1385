"""Writes train.bin, val.bin and meta.json in a way that an interrupted preparation can continue.

While the token files are being written, their names end in .partial, and prepare.json records how
much of them is valid. meta.json is written last. token_file.py has the formats.
"""

import contextlib
import copy
import os
from collections import Counter
from pathlib import Path

import numpy as np

from configurator import UserError
from onenight.data.token_file import (
    BYTES_PER_TOKEN,
    COUNT,
    FORMAT,
    JOB_SHAPE,
    SPLIT_SHAPE,
    SPLITS,
    TOKEN_DTYPE,
    check_tokens,
    is_whole,
    read_meta,
)
from onenight.data.tokenizer import EOT
from onenight.system.files import rename
from onenight.system.json_files import read_json, write_json

STATE_SHAPE = {"rows": COUNT, **dict.fromkeys(SPLITS, SPLIT_SHAPE)}
JOURNAL_SHAPE = {"job": JOB_SHAPE, "state": STATE_SHAPE}
BUFFER_BYTES = 1 << 20  # of each file, in memory


class BinsWriter:
    """Writes both splits, and continues unfinished work for the same job.

    Args:
        out_dir: the folder of the files.
        job: what determines their contents, as JSON: "settings" and "sources".
        counters: the caller's own counters, which are saved with the state and go into meta.json.
        overwrite: whether files of another job may be replaced.

    Attributes:
        state: the input rows processed, the tokens and documents of each split, and the counters.

    Raises UserError if files of another job exist and `overwrite` is False.
    """

    def __init__(self, out_dir: Path, job: dict, counters: dict, overwrite: bool):
        self.out_dir = out_dir
        self.job = job
        self.counters = counters
        self.journal = out_dir / "prepare.json"

        earlier = read_json(self.journal, JOURNAL_SHAPE)
        self.paths = unfinished_paths(out_dir)
        files_exist = all(path.exists() for path in self.paths.values())
        if files_exist and earlier.get("job") == job:
            # An older version had fewer counters.
            self.state = {**copy.deepcopy(counters), **earlier["state"]}
        else:
            if not overwrite:
                refuse_to_lose(out_dir, earlier, job)
            self.start_over()

        # What was written after the last checkpoint is cut off.
        self.files = {}
        for split, path in self.paths.items():
            file = open(path, "r+b", buffering=BUFFER_BYTES)
            file.truncate(self.state[split]["tokens"] * BYTES_PER_TOKEN)
            file.seek(0, os.SEEK_END)
            self.files[split] = file

    def start_over(self):
        """Begin with empty files."""
        self.state = {"rows": 0}
        for split in SPLITS:
            self.state[split] = {"tokens": 0, "documents": 0}
        self.state.update(copy.deepcopy(self.counters))
        self.journal.unlink(missing_ok=True)
        self.paths = partial_paths(self.out_dir)
        for path in self.paths.values():
            path.write_bytes(b"")

    @property
    def tokens(self) -> int:
        """The tokens of both splits."""
        return sum(self.state[split]["tokens"] for split in SPLITS)

    @property
    def documents(self) -> int:
        """The documents of both splits."""
        return sum(self.state[split]["documents"] for split in SPLITS)

    def write(self, split: str, ids: np.ndarray):
        """Append the ids of whole documents, each of which ends with end-of-text."""
        self.files[split].write(ids.astype(TOKEN_DTYPE, copy=False).data)
        self.state[split]["tokens"] += len(ids)
        self.state[split]["documents"] += int((ids == EOT).sum())

    def checkpoint(self):
        """Save the state, so that everything written so far survives a power cut."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        write_json(self.journal, {"job": self.job, "state": self.state})

    def close(self):
        """Close the files."""
        for file in self.files.values():
            # On a full disk this fails, but prepare.json records how much of the file is valid.
            with contextlib.suppress(OSError):
                file.close()

    def discard(self):
        """Delete the unfinished work."""
        self.close()
        clear_work(self.out_dir)

    def finish(self) -> Counter:
        """Check what is on the disk, give both files their final names, and write meta.json.

        Returns how many documents have each length, in tokens without end-of-text. Raises UserError
        if the files are damaged.
        """
        self.checkpoint()
        self.close()

        lengths = Counter()
        splits = {}
        largest_id = {}
        for split, path in self.paths.items():
            try:
                contents = check_tokens(path, **self.state[split])
            except UserError:
                self.journal.unlink()  # this work must not be continued
                raise
            lengths += contents.document_lengths
            splits[split] = {**self.state[split], "sha256": contents.sha256}
            largest_id[split] = contents.largest_id

        # In this order a file is never beside the meta.json, or the other split, of another job.
        meta_file = self.out_dir / "meta.json"
        meta_file.unlink(missing_ok=True)
        final = final_paths(self.out_dir)
        if self.paths["val"] != final["val"]:
            final["val"].unlink(missing_ok=True)
        for split, path in self.paths.items():
            rename(path, final[split])
        counters = {key: self.state[key] for key in self.counters}
        meta = {**FORMAT, **counters, **splits, "largest_id": largest_id, **self.job}
        write_json(meta_file, meta)
        self.journal.unlink()
        return lengths


# -----------------------------------------------------------------------------
# The files of a preparation


def final_paths(out_dir: Path) -> dict[str, Path]:
    """Return the path of each split when it is finished."""
    return {split: out_dir / f"{split}.bin" for split in SPLITS}


def partial_paths(out_dir: Path) -> dict[str, Path]:
    """Return the path of each split while it is being written."""
    return {split: out_dir / f"{split}.bin.partial" for split in SPLITS}


def unfinished_paths(out_dir: Path) -> dict[str, Path]:
    """Return the path at which interrupted work left each split.

    If the interruption came while the files were being renamed, which happens without a meta.json,
    a split may have its final name already.
    """
    paths = partial_paths(out_dir)
    if not (out_dir / "meta.json").exists():
        for split, path in final_paths(out_dir).items():
            if not paths[split].exists():
                paths[split] = path
    return paths


def clear_work(out_dir: Path):
    """Delete the temporary files of a preparation, but no finished file."""
    temporary = [out_dir / "prepare.json", out_dir / "prepare.json.partial"]
    temporary += partial_paths(out_dir).values()
    for path in temporary:
        path.unlink(missing_ok=True)


def is_complete(out_dir: Path, job: dict) -> bool:
    """Return whether the finished files of exactly this job exist, in full size."""
    meta = read_meta(out_dir)
    for key, value in job.items():
        if meta.get(key) != value:
            return False
    for split, path in final_paths(out_dir).items():
        tokens = meta.get(split, {}).get("tokens")
        if tokens is None or not is_whole(path, tokens):
            return False
    return True


# -----------------------------------------------------------------------------
# What a job would replace


def refuse_to_lose(out_dir: Path, unfinished: dict, job: dict):
    """Raise UserError if a job would replace the files of another, finished or not.

    `unfinished` is the content of prepare.json.
    """
    unfinished_job = unfinished.get("job", {})
    unfinished_rows = unfinished.get("state", {}).get("rows", 0)
    found = None
    if unfinished_rows > 0 and unfinished_job != job:
        found = f"an unfinished preparation of {differences(unfinished_job, job)}"
    elif any((out_dir / name).exists() for name in ("meta.json", "train.bin", "val.bin")):
        found = f"finished bins of {differences(read_meta(out_dir), job)}"
    if found:
        raise UserError(
            f"{out_dir}: contains {found}; choose another --out_dir, or replace it with --overwrite"
        )


def differences(old: dict, new: dict) -> str:
    """Return how an old job differs from a new one, in words."""
    if not JOB_SHAPE.keys() <= old.keys():
        return "unknown origin"

    changed = []
    for key, value in new["settings"].items():
        before = old["settings"].get(key)
        if before != value:
            changed.append(f"{key} {before}, now {value}")
    if changed:
        return f"other settings ({'; '.join(changed)})"

    files = file_names(old)
    if files != file_names(new):
        return f"other files ({files:.100})"
    if old["sources"] != new["sources"]:
        return f"the same files before they were changed ({files:.100})"
    return "other sizes than its meta.json says"


def file_names(job: dict) -> str:
    """Return the names of a job's source files, separated by commas."""
    return ", ".join(source.get("file", "?") for source in job["sources"])
