"""
train.bin, val.bin and meta.json: written so that any interruption can be continued, checked, and opened.

The bins are nanoGPT's: token ids as little-endian uint16, no header. meta.json says what they hold and of what they
were made. While they are being written they end in .partial, and prepare.json says how far they are good.
"""

import contextlib
import hashlib
import json
import os
import threading
from collections import Counter
from pathlib import Path

import numpy as np

from files import rename, replacing
from tokenizer import EOT, VOCAB_SIZE

SPLITS = ("train", "val")
CHUNK = 1 << 23  # tokens read at once


class BinsWriter:
    """
    Both splits on their way, and how far they are: `state` has rows (input rows dealt with), for each split its
    tokens and documents, and the caller's `counters`. `job` is what determines the content: settings and sources.
    Work on the disk for the same job is taken up; raises SystemExit where bins of another job would be lost and
    `overwrite` is not set, OSError where the disk does not do its part.
    """

    def __init__(self, out_dir: Path, job: dict, counters: dict, overwrite: bool):
        self.out_dir, self.job = out_dir, job
        self.journal = out_dir / "prepare.json"
        self.state = {"rows": 0, **{split: {"tokens": 0, "documents": 0} for split in SPLITS}, **counters}
        earlier = read_json(self.journal)
        if earlier.get("job") == job and self._is_sound(earlier["state"]):
            self.state = earlier["state"]
        else:
            if not overwrite:
                self._refuse_to_lose(earlier)
            self.journal.unlink(missing_ok=True)
            for split in SPLITS:
                self._partial(split).write_bytes(b"")
        self.files = {}
        for split in SPLITS:
            if self._partial(split).exists():  # else the last run was stopped after its renaming
                self.files[split] = open(self._partial(split), "r+b", buffering=1 << 20)
                self.files[split].truncate(2 * self.state[split]["tokens"])
                self.files[split].seek(0, os.SEEK_END)

    @property
    def tokens(self) -> int:
        return sum(self.state[split]["tokens"] for split in SPLITS)

    @property
    def documents(self) -> int:
        return sum(self.state[split]["documents"] for split in SPLITS)

    def write(self, split: str, ids: np.ndarray, documents: int):
        """Appends the ids of whole documents, each with its end-of-text."""
        self.files[split].write(ids.astype("<u2", copy=False).data)
        self.state[split]["tokens"] += len(ids)
        self.state[split]["documents"] += documents

    def checkpoint(self):
        """What was written until now survives a power cut."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        write_json(self.journal, {"job": self.job, "state": self.state})

    def close(self):
        for file in self.files.values():
            with contextlib.suppress(OSError):  # a full disk: prepare.json says how far the file is good
                file.close()

    def discard(self):
        """Leaves nothing of the work so far."""
        self.close()
        clear_work(self.out_dir)

    def finish(self, meta: dict) -> Counter:
        """
        Checks what lies on the disk, puts both bins in place and meta.json last. Until then there is no train.bin
        beside a meta.json that does not belong to it. Returns how many documents there are of each length in tokens.
        """
        self.checkpoint()
        self.close()
        lengths = Counter()
        for split in SPLITS:
            path = self._partial(split) if split in self.files else self.out_dir / f"{split}.bin"
            try:
                found, digest = check_bin(path, **self.state[split])
            except SystemExit:
                self.journal.unlink()  # not to be continued
                raise
            lengths += found
            meta[split] = {**self.state[split], "sha256": digest}
        (self.out_dir / "meta.json").unlink(missing_ok=True)
        if "val" in self.files:
            (self.out_dir / "val.bin").unlink(missing_ok=True)
        for split in self.files:
            rename(self._partial(split), self.out_dir / f"{split}.bin")
        write_json(self.out_dir / "meta.json", meta | self.job)
        self.journal.unlink()
        return lengths

    def _partial(self, split: str) -> Path:
        return self.out_dir / f"{split}.bin.partial"

    def _is_sound(self, state: dict) -> bool:
        """Whether each bin is there with as many bytes as the state counts on."""
        for split in SPLITS:
            final, needed = self.out_dir / f"{split}.bin", 2 * state[split]["tokens"]
            if self._partial(split).exists():
                if self._partial(split).stat().st_size < needed:
                    return False
            elif not final.exists() or final.stat().st_size != needed:
                return False
        return True

    def _refuse_to_lose(self, earlier: dict):
        if earlier.get("state", {}).get("rows") and earlier["job"] != self.job:
            what = f"an unfinished preparation of {differences(earlier['job'], self.job)}"
        elif (self.out_dir / "meta.json").exists():
            what = f"finished bins of {differences(read_meta(self.out_dir), self.job)}"
        elif any((self.out_dir / f"{split}.bin").exists() for split in SPLITS):
            what = "bins of unknown origin"
        else:
            return
        raise SystemExit(f"{self.out_dir}: holds {what}; choose another --out_dir, or replace it with --overwrite")


def is_complete(out_dir: Path, job: dict) -> bool:
    """Whether the bins of this very job are there, in full size."""
    meta = read_meta(out_dir)
    if any(meta.get(key) != job[key] for key in job):
        return False
    bins = [(out_dir / f"{split}.bin", 2 * meta[split]["tokens"]) for split in SPLITS]
    return all(path.exists() and path.stat().st_size == size for path, size in bins)


def clear_work(out_dir: Path):
    """Removes what a preparation leaves on its way, and no finished bin."""
    for name in ("prepare.json", "prepare.json.partial", *(f"{split}.bin.partial" for split in SPLITS)):
        (out_dir / name).unlink(missing_ok=True)


def differences(old: dict, new: dict) -> str:
    """What changed between two jobs, as 'other settings (val_fraction 0.005, now 0.01)'."""
    before, after = old.get("settings", {}), new["settings"]
    changed = [f"{key} {before.get(key)}, now {after[key]}" for key in after if before.get(key) != after[key]]
    names = [[source["file"] for source in job.get("sources", [])] for job in (old, new)]
    if changed:
        return f"other settings ({'; '.join(changed)})"
    if names[0] != names[1]:
        return f"other files ({', '.join(names[0][:3])}{', ...' if len(names[0]) > 3 else ''})"
    edited = [now["file"] for then, now in zip(old["sources"], new["sources"]) if then != now]
    return (
        f"the same files before they were changed ({', '.join(edited)})"
        if edited
        else "other sizes than its meta.json says"
    )


def check_bin(path: Path, tokens: int, documents: int, sha256: str | None = None) -> tuple[Counter, str]:
    """
    Reads the whole file and returns how many documents there are of each length (in tokens, without end-of-text),
    and the sha256. Raises SystemExit where it does not hold `tokens` ids of GPT-2 in `documents` documents.
    """
    lengths, digest, largest, seen, last_end = Counter(), hashlib.sha256(), 0, 0, -1
    with open(path, "rb") as file:
        while raw := file.read(2 * CHUNK):
            digest.update(raw)
            ids = np.frombuffer(raw[: len(raw) // 2 * 2], "<u2")
            largest = max(largest, int(ids.max(initial=0)))
            ends = np.flatnonzero(ids == EOT) + seen // 2
            values, counts = np.unique(np.diff(ends, prepend=last_end) - 1, return_counts=True)
            lengths.update(dict(zip(values.tolist(), counts.tolist())))
            last_end = ends[-1] if len(ends) else last_end
            seen += len(raw)
    found = {"bytes": seen, "end-of-text tokens": lengths.total(), "largest id": largest, "sha256": digest.hexdigest()}
    expected = {"bytes": 2 * tokens, "end-of-text tokens": documents, "largest id": min(largest, VOCAB_SIZE - 1)}
    expected["sha256"] = sha256 or digest.hexdigest()
    wrong = [f"{key} {found[key]} instead of {expected[key]}" for key in found if found[key] != expected[key]]
    if wrong:
        raise SystemExit(f"{path}: damaged ({', '.join(wrong)}); prepare it again with --overwrite")
    return lengths, digest.hexdigest()


class TokenFile:
    """
    A bin as if it were an array, of which tokens[start:stop], uint16 (stop - start,), is read from the disk when asked
    for, by any thread. The pages of a memory map would count as the memory of this process, up to the whole file.
    """

    def __init__(self, path: Path):
        self._file, self._lock = open(path, "rb", buffering=0), threading.Lock()
        self._tokens = os.fstat(self._file.fileno()).st_size // 2

    def __len__(self) -> int:
        return self._tokens

    def __getitem__(self, window: slice) -> np.ndarray:
        start, stop, _ = window.indices(self._tokens)
        with self._lock:
            self._file.seek(2 * start)
            return np.frombuffer(self._file.read(2 * max(0, stop - start)), "<u2")


def open_bin(data_dir: Path, split: str, block_size: int, vocab_size: int) -> TokenFile:
    """
    The tokens of one split. Raises SystemExit if the file is
    missing, odd in length, not the size that meta.json says, too short for a window, or has ids that the
    model's vocabulary lacks (on a GPU those would end in an assertion without a name).
    """
    path = data_dir / f"{split}.bin"
    if not path.exists():
        raise SystemExit(f"{path}: no such file; make it with: python prepare_single_parquet.py --out_dir={data_dir}")
    size = path.stat().st_size
    if size % 2:
        raise SystemExit(f"{path}: {size} bytes is no whole number of uint16 tokens; prepare it again")
    tokens = read_meta(data_dir).get(split, {}).get("tokens", size // 2)
    if tokens != size // 2:
        raise SystemExit(f"{path}: {size // 2:,} tokens, but meta.json says {tokens:,}; prepare it again")
    if tokens <= block_size:
        raise SystemExit(
            f"{path}: {tokens:,} tokens are too few for one window of block_size={block_size}; "
            f"prepare more documents{', or a larger val_fraction' if split == 'val' else ''}, or lower block_size"
        )
    bin = TokenFile(path)
    largest = max(int(bin[start : start + CHUNK].max()) for start in range(0, tokens, CHUNK))
    if largest >= vocab_size:
        raise SystemExit(f"{path}: holds id {largest}, but the model's vocab_size is {vocab_size}; wrong file?")
    return bin


def read_meta(data_dir: Path) -> dict:
    """meta.json; {} if there is none, as in nanoGPT's own data folders. Raises SystemExit if it is damaged."""
    return read_json(data_dir / "meta.json")


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        return content
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, OSError) as error:
        raise SystemExit(f"{path}: cannot be read ({error}); delete it and prepare again") from None


def write_json(path: Path, content: dict):
    with replacing(path, "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
