"""Document sources: every format gives its documents, every bad input an error that names it."""

# ruff: noqa: RUF001 - Chinese punctuation is meant

import gzip
import json
import os
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from swr_jax.data import open_source
from swr_jax.data.documents import JsonLines, ParquetRows, TextFiles

DOCUMENTS = ["first\nline", "第二個文檔：混合 script ✓", "", "тре\u2028тий", "x" * 1000]


def contents(source) -> list[bytes]:
    return [source[index] for index in range(len(source))]


def json_lines(documents, field="text") -> bytes:
    return b"".join(json.dumps({"id": 1, field: d}).encode() + b"\n" for d in documents)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# Text


def test_a_folder_is_read_to_any_depth_in_the_order_of_names(tmp_path):
    write(tmp_path / "b.txt", "乙".encode())
    write(tmp_path / "a" / "deep" / "z.py", b"print()")
    write(tmp_path / "a" / "a.md", b"# A")
    for left_out in (".git/config", "a/.hidden", "empty.txt", "image.png"):
        write(tmp_path / left_out, b"\x89PNG\0\0" if left_out.endswith("png") else b"")
    write(tmp_path / ".git" / "config", b"text")
    assert contents(open_source(str(tmp_path))) == [b"# A", b"print()", "乙".encode()]


def test_a_pattern_picks_files(tmp_path):
    for name in ("one.txt", "two.txt", "three.md", "sub/four.txt"):
        write(tmp_path / name, name.encode())
    assert contents(open_source(f"{tmp_path}/*.txt")) == [b"one.txt", b"two.txt"]
    assert contents(open_source(f"{tmp_path}/**/*.txt")) == [
        b"one.txt",
        b"sub/four.txt",
        b"two.txt",
    ]


def test_bytes_that_are_no_text_come_through_unchanged(tmp_path):
    mixed = "文字".encode() + bytes(range(256)) + b"\xc3" + b"end"
    path = write(tmp_path / "mixed.bin", mixed)
    assert b"".join(contents(open_source(str(path)))) == mixed


def test_a_single_large_file_is_cut_at_line_ends_into_about_128_documents(tmp_path):
    lines = [f"第{i}行 with some words\n".encode() * (1 + i % 3) for i in range(40_000)]
    path = write(tmp_path / "book.txt", b"".join(lines))
    pieces = contents(open_source(str(path)))
    assert b"".join(pieces) == path.read_bytes()
    assert 128 <= len(pieces) <= 140
    assert all(piece.endswith(b"\n") for piece in pieces)


def test_a_file_without_line_ends_is_cut_between_characters(tmp_path):
    text = "中é👍a" * 5000
    path = write(tmp_path / "one_line.txt", text.encode())
    pieces = contents(open_source(str(path)))
    assert len(pieces) > 5
    assert "".join(piece.decode() for piece in pieces) == text  # each decodes by itself


def test_continuation_bytes_without_end_are_cut_all_the_same(tmp_path):
    path = write(tmp_path / "odd.txt", b"\x80" * 20_000)
    pieces = contents(open_source(str(path)))
    assert len(pieces) == 5
    assert b"".join(pieces) == b"\x80" * 20_000


def test_many_files_stay_whole(tmp_path):
    for index in range(128):
        write(tmp_path / f"{index:03d}.txt", b"line\n" * 2000)
    assert contents(open_source(str(tmp_path))) == [b"line\n" * 2000] * 128


def test_the_embedded_corpus_is_the_standard_library():
    source = open_source("python")
    assert isinstance(source, TextFiles)
    root = Path(sysconfig.get_path("stdlib"))
    documents = set(contents(source))
    for name in ("os.py", "json/decoder.py", "typing.py"):
        assert (root / name).read_bytes() in documents
    assert (root / "encodings" / "cp1252.py").read_bytes() not in documents
    assert Path(pytest.__file__).read_bytes() not in documents  # site-packages
    assert sum(map(len, documents)) > 4_000_000
    assert contents(open_source("python")) == contents(source)


# JSON lines


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.ndjson", "d.json.gz"])
def test_json_lines_plain_and_gzipped(tmp_path, name):
    content = json_lines(DOCUMENTS)
    path = write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    source = open_source(str(path))
    assert isinstance(source, JsonLines)
    assert contents(source) == [d.encode() for d in DOCUMENTS]
    assert source[3] == DOCUMENTS[3].encode()
    with pytest.raises(IndexError, match=r"index 5 must be in \[0, 5\)"):
        source[5]


def test_json_lines_of_several_files_follow_each_other(tmp_path):
    write(tmp_path / "b.jsonl", json_lines(["three"]))
    # Several gzip members in one file, as `cat` makes them.
    write(tmp_path / "a.jsonl.gz", b"".join(gzip.compress(json_lines([d])) for d in ("one", "two")))
    assert contents(open_source(str(tmp_path))) == [b"one", b"two", b"three"]


def test_json_lines_pass_over_blank_lines_and_need_no_last_line_end(tmp_path):
    content = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \t\n\n{"text": "b"}'
    assert contents(open_source(str(write(tmp_path / "d.jsonl", content)))) == [b"a", b"b"]


def test_json_lines_of_another_field(tmp_path):
    path = write(tmp_path / "d.jsonl", json_lines(["a"], field="content"))
    assert contents(open_source(str(path), text_field="content")) == [b"a"]
    with pytest.raises(ValueError, match=r"d.jsonl:1 has \['content', 'id'\].*'text'.*text_field="):
        open_source(str(path))[0]


def test_undecodable_json_text_becomes_replacement_characters(tmp_path):
    content = b'{"text": "a\xff\xe4b"}\n{"text": "\\ud800 \\ud83d\\ude00"}\n'
    source = open_source(str(write(tmp_path / "d.jsonl", content)))
    assert [text.decode() for text in contents(source)] == ["a\ufffd\ufffdb", "\ufffd 😀"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'"only a string"', "is no object"),
        (b'{"text": null}', r"has \['text'\]: it must be an object with a string"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(tmp_path, line, message):
    path = write(tmp_path / "d.jsonl", b'\n{"text": "good"}\n' + line + b"\n")
    source = open_source(str(path))
    assert source[0] == b"good"
    with pytest.raises(ValueError, match=rf"d\.jsonl:3 {message}"):
        source[1]


def test_damaged_gzip_is_named(tmp_path):
    whole = gzip.compress(json_lines(DOCUMENTS * 100))
    write(tmp_path / "cut.jsonl.gz", whole[:-20])
    write(tmp_path / "bent.jsonl.gz", whole[:40] + b"\xff\0\xff" + whole[43:])
    for name in ("cut", "bent"):
        with pytest.raises(ValueError, match=rf"{name}.jsonl.gz is not a whole gzip file"):
            open_source(str(tmp_path / f"{name}.jsonl.gz"))


# Parquet


def test_parquet_rows_across_row_groups_and_files(tmp_path):
    documents = [f"文檔 {i} " * (i % 7) for i in range(25)]
    for name, part in (("a", documents[:20]), ("b", documents[20:])):
        # FineWeb-Edu's schema has these among its columns.
        table = pa.table({"text": part, "id": part, "score": [3.5] * len(part)})
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=6)
    source = open_source(str(tmp_path))
    assert isinstance(source, ParquetRows)
    assert contents(source) == [d.encode() for d in documents]
    assert [source[i] for i in (24, 0, 13)] == [documents[i].encode() for i in (24, 0, 13)]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()])
def test_parquet_columns_of_every_string_type(tmp_path, kind):
    content = [b"plain", "混".encode()]
    parquet.write_table(pa.table({"c": pa.array(content).cast(kind)}), tmp_path / "d.parquet")
    assert contents(open_source(str(tmp_path), text_field="c")) == content


def test_parquet_text_that_is_not_utf8_is_read(tmp_path):
    bad = pa.array([b"a\xff"]).view(pa.string())
    parquet.write_table(pa.table({"text": bad}), tmp_path / "d.parquet")
    assert contents(open_source(str(tmp_path))) == [b"a\xff"]


def test_parquet_keeps_few_row_groups_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("swr_jax.data.documents._PARQUET_CACHE", 3000)
    parquet.write_table(
        pa.table({"text": ["x" * 1000] * 20}), tmp_path / "d.parquet", row_group_size=1
    )
    source = open_source(str(tmp_path))
    assert contents(source) == [b"x" * 1000] * 20
    assert len(source._cache) <= 3


def test_bad_parquet_is_named(tmp_path):
    write(tmp_path / "bad.parquet", b"PAR1 but no more")
    with pytest.raises(ValueError, match=r"bad\.parquet is not a Parquet file"):
        open_source(str(tmp_path / "bad.parquet"))
    parquet.write_table(pa.table({"text": [1], "n": [None]}), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"d\.parquet: column 'text' is int64 and must be string"):
        open_source(str(tmp_path / "d.parquet"))
    with pytest.raises(ValueError, match=r"columns \['text', 'n'\]: text_field='body' must be"):
        open_source(str(tmp_path / "d.parquet"), text_field="body")
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"none\.parquet is empty"):
        open_source(str(tmp_path / "none.parquet"))
    parquet.write_table(pa.table({"text": ["a", None]}), tmp_path / "null.parquet")
    with pytest.raises(ValueError, match=r"null\.parquet, row 1 of row group 0: 'text' is null"):
        open_source(str(tmp_path / "null.parquet"))[1]


def test_parquet_without_pyarrow_says_how_to_install_it(tmp_path, monkeypatch):
    write(tmp_path / "d.parquet", b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"'pyarrow': pip install 'swr_jax\[text\]'"):
        open_source(str(tmp_path))


# Choice of the kind, and inputs that hold nothing


def test_a_kind_that_is_named_overrides_the_suffix(tmp_path):
    path = write(tmp_path / "lines.data", json_lines(["a", "b"]))
    assert contents(open_source(str(path), kind="jsonl")) == [b"a", b"b"]
    path = write(tmp_path / "lines.jsonl", json_lines(["a", "b"]))
    assert contents(open_source(str(path), kind="text")) == [json_lines(["a", "b"])]


def test_a_folder_of_several_kinds_asks_which(tmp_path):
    write(tmp_path / "d.jsonl", json_lines(["a"]))
    write(tmp_path / "README.md", b"# About")
    with pytest.raises(ValueError, match=r"several kinds \(jsonl, text\): name .* kind="):
        open_source(str(tmp_path))
    assert contents(open_source(str(tmp_path), kind="jsonl")) == [b"a"]
    with pytest.raises(ValueError, match=r"holds no file of kind 'parquet' \(\.parquet\)"):
        open_source(str(tmp_path), kind="parquet")


@pytest.mark.parametrize("name", ["d.txt", "d.jsonl", "d.parquet"])
def test_an_empty_file_is_named(tmp_path, name):
    path = write(tmp_path / name, b"")
    with pytest.raises(ValueError, match=rf"{name} is empty"):
        open_source(str(path))


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
def test_json_lines_with_blank_lines_only_are_empty(tmp_path, name):
    content = gzip.compress(b"\n \n") if name.endswith("gz") else b"\n \n"
    with pytest.raises(ValueError, match=rf"{name} is empty: it must hold one JSON object"):
        open_source(str(write(tmp_path / name, content)))


def test_an_empty_gzip_member_is_an_empty_file(tmp_path):
    with pytest.raises(ValueError, match=r"d\.jsonl\.gz is empty"):
        open_source(str(write(tmp_path / "d.jsonl.gz", gzip.compress(b""))))


def test_sources_that_do_not_exist_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere' does not exist: it must be 'python', a file"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"\*\.txt' matches no file"):
        open_source(f"{tmp_path}/*.txt")
    with pytest.raises(ValueError, match="is a folder with no files"):
        open_source(str(tmp_path))
    write(tmp_path / "a.bin", b"\0")
    with pytest.raises(ValueError, match="holds no text: its files are all empty or binary"):
        open_source(str(tmp_path))
    with pytest.raises(ValueError, match=r"kind='csv' must be one of auto, python, text"):
        open_source(str(tmp_path), kind="csv")


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    # A link to itself cannot be opened by anyone, root included.
    os.symlink(tmp_path / "loop.txt", tmp_path / "loop.txt")
    write(tmp_path / "good.txt", b"good")
    with pytest.raises(ValueError, match=r"loop\.txt cannot be read: Too many levels"):
        open_source(str(tmp_path))
