"""The demo's documents are like FineWeb's."""

from pyarrow import parquet

import make_demo
from helpers import run_here
from reference import count_tokens


def test_the_demo_file_is_like_fineweb(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unusual = {"lone": "a\ud800b", "special": "<|endoftext|>"}
    monkeypatch.setattr(make_demo, "topics", {**unusual, **make_demo.topics})
    result = run_here(make_demo, "--max_tokens=20000")
    assert result.returncode == 0, result.stderr

    table = parquet.read_table("data/demo/train/docs.parquet")
    assert table.column_names == ["text", "id", "token_count"]
    counts = table["token_count"].to_pylist()
    assert counts == [count_tokens(text) for text in table["text"].to_pylist()]
    assert 20_000 <= sum(counts) < 40_000
    assert {"help('lone')", "help('special')"} <= set(table["id"].to_pylist())
    assert f"{sum(counts):,} GPT-2 tokens" in result.stdout


def test_modules_are_read_without_being_imported(tmp_path):
    long_docstring = " ".join(["What it is for."] * 40)
    code = f'''"""{long_docstring}"""
raise RuntimeError("imported")
class A:
    """A class."""
    async def method(self, x: int = 1, *rest):
        """A method."""
def undocumented(): pass
'''
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text(code)
    (tmp_path / "package" / "module.py").write_text(code)
    (tmp_path / "package" / "short.py").write_text('"""Short."""')
    (tmp_path / "package" / "broken.py").write_text(code + "def")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "module.py").write_text(code)
    text = f"{long_docstring}\n\nclass A\n\nA class.\n\nmethod(self, x: int=1, *rest)\n\nA method."
    found = list(make_demo.read_modules(tmp_path))
    assert found == [("package", text), ("package.module", text)]
