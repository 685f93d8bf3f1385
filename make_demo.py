"""
Collects the English text of this Python installation in data/demo/train/docs.parquet.

    python make_demo.py

The documents are the help topics and, for each module of the standard library and of the installed
packages, its docstrings, as help() would show them. Files are parsed, never imported. The columns
are three of FineWeb's.
"""

from onenight.startup import run_script

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq

from configurator import configure, setting
from onenight.process import make_folder, replacing
from onenight.tokenizer import encode_document

TARGET = Path("data/demo/train/docs.parquet")
MIN_CHARACTERS = 500  # of a module's docstrings; shorter modules are skipped
# Tests are much code with few docstrings, and the packages are a folder of their own.
SKIPPED_FOLDERS = {"test", "tests", "site-packages"}


@dataclass
class DemoConfig:
    # The demo trains on 600,000 tokens.
    max_tokens: int = setting(
        2_000_000, "stop after the document that reaches this many tokens", low=1
    )


def main(arguments: list[str]):
    config, _ = configure(DemoConfig, arguments, __doc__)
    make_folder(TARGET.parent)

    print("reading the docstrings of this Python installation")
    documents = []
    tokens = 0
    for name, text in read_documents():
        text = text.encode("utf-8", "replace").decode()  # parquet has no lone surrogates
        count = len(encode_document(text))
        documents.append({"text": text, "id": name, "token_count": count})
        tokens += count
        if tokens >= config.max_tokens:
            break

    # This order depends on the names only, and mixes the packages.
    documents.sort(key=lambda document: hashlib.sha256(document["id"].encode()).digest())

    table = pa.Table.from_pylist(documents)
    with replacing(TARGET) as file:
        pq.write_table(table, file, row_group_size=1000, compression="zstd")
    print(f"{TARGET}: {len(documents):,} documents, {tokens:,} GPT-2 tokens")


def read_documents() -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each document.

    These are the topics of help(), then the standard library, then the installed packages.
    """
    for name, text in topics.items():
        yield f"help('{name}')", text
    folders = sysconfig.get_paths()
    for key in ("stdlib", "purelib"):
        yield from read_modules(Path(folders[key]))


def read_modules(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the docstrings of each module below a folder, without tests."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED_FOLDERS.isdisjoint(parts):
            continue
        text = "\n\n".join(docstrings(path))
        if len(text) >= MIN_CHARACTERS:
            yield ".".join(parts).removesuffix(".__init__"), text


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstring of a module, then of each class and function, below its signature."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in other people's code
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        if isinstance(node, ast.Module):
            yield text
        elif isinstance(node, ast.ClassDef):
            yield f"class {node.name}\n\n{text}"
        else:
            yield f"{node.name}({ast.unparse(node.args)})\n\n{text}"


if __name__ == "__main__":
    run_script(main)
