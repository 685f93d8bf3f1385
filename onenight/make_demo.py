"""
Writes data/demo/train/docs.parquet: the English text in this Python installation, in FineWeb's schema.

    python -m onenight.make_demo

The documents are the pydoc topics, and for each module of the standard library and of the installed packages its
docstrings, as help() would show them. Files are parsed, never imported.
"""

import ast
import hashlib
import sysconfig
import warnings
from pathlib import Path
from pydoc_data.topics import topics

from onenight.files import make_folder, replacing
from onenight.tokenizer import encode_document

import pyarrow as pa
import pyarrow.parquet as pq

TARGET = Path("data/demo/train/docs.parquet")
MAX_TOKENS = 2_000_000  # the demo trains on 600,000 of them
SKIPPED = {"test", "tests", "site-packages"}  # much code with few docstrings; the packages have their own turn


def main():
    make_folder(TARGET.parent)
    print("reading the docstrings of this Python installation")
    documents, tokens = [], 0
    for name, text in read_documents():
        text = text.encode("utf-8", "replace").decode()  # a parquet string cannot hold a lone surrogate
        count = len(encode_document(text))
        documents.append({
            "text": text, "id": name, "dump": "demo", "url": f"pydoc:{name}", "date": "",
            "file_path": "this Python installation", "language": "en", "language_score": 1.0, "token_count": count,
        })  # fmt: skip
        tokens += count
        if tokens >= MAX_TOKENS:
            break
    # In an order that depends on the names only, and mixes the packages.
    documents.sort(key=lambda document: hashlib.sha256(document["id"].encode()).digest())
    with replacing(TARGET) as file:
        pq.write_table(pa.Table.from_pylist(documents), file, row_group_size=1000, compression="zstd")
    print(f"{TARGET}: {len(documents):,} documents, {tokens:,} GPT-2 tokens")


def read_documents():
    """Yields (name, text): the topics of help(), the standard library, then the installed packages, without tests."""
    for name, text in topics.items():
        yield f"help('{name}')", text
    folders = sysconfig.get_paths()
    for root in (Path(folders["stdlib"]), Path(folders["purelib"])):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            text = "\n\n".join(docstrings(path)) if SKIPPED.isdisjoint(parts) else ""
            if len(text) >= 500:
                yield ".".join(parts).removesuffix(".__init__"), text


def docstrings(path: Path):
    """Yields the module's docstring, then 'name(arguments)' and docstring of each class and function."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in other people's code
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            if isinstance(node, ast.ClassDef):
                text = f"class {node.name}\n\n{text}"
            elif not isinstance(node, ast.Module):
                text = f"{node.name}({ast.unparse(node.args)})\n\n{text}"
            yield text


if __name__ == "__main__":
    main()
