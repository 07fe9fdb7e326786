"""Files to rows: text comes out as it stands in the file, and what is wrong is said with file and line."""

import gzip
import json
import re
import zlib

import pytest

pytest.importorskip("datasets", reason="comes with the extra `train`")

import pyarrow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from smoothie_kernels.diffusion import data
from smoothie_kernels.diffusion.data import has_split, load_text
from smoothie_kernels.diffusion.reading import read_rows

pytestmark = pytest.mark.usefixtures("own_caches")
LIKE_NUMBERS = ["007", "1.50", "TRUE", "NA", "null", "1e5", "2024-01-01T00:00:00Z", "-0", "NaN", " x ", '"']


def texts(path, **choices):
    return load_text(str(path), "train", unconditional=True, **choices)["target"][:]


def write(path, content):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- Text is text


def test_numbers_and_dates_stay_text(tmp_path):
    quoted = ['"' + word.replace('"', '""') + '"' for word in LIKE_NUMBERS]
    assert texts(write(tmp_path / "a.csv", "\n".join(["text", *quoted]))) == LIKE_NUMBERS
    assert texts(write(tmp_path / "b.csv", "text,n\n" + "7,1\n" * 20_000 + "x,1\n"))[-2:] == ["7", "x"]
    lines = [json.dumps({"text": word, "n": 1}) for word in LIKE_NUMBERS]
    assert texts(write(tmp_path / "a.jsonl", "\n".join(lines))) == LIKE_NUMBERS
    assert texts(write(tmp_path / "a.json", "[" + ",\n".join(lines) + "]")) == LIKE_NUMBERS


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1, max_size=5))
def test_any_text(tmp_path, words):
    """In every format, whatever the text holds: quotes, commas, ends of lines of any alphabet."""
    quoted = ['"' + word.replace('"', '""') + '"' for word in words]
    write(tmp_path / "a.csv", "text\n" + "\n".join(quoted) + "\n")
    write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": word}, ensure_ascii=False) for word in words))
    parquet.write_table(pyarrow.table({"text": words}), tmp_path / "a.parquet")
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        assert [row["text"] for _, row in read_rows(tmp_path / name)] == words


def test_a_long_field_and_a_byte_order_mark(tmp_path):
    long = "x" * 200_000  # more than the csv module takes by itself
    assert texts(write(tmp_path / "a.csv", f"\ufefftext\n{long}\n")) == [long]
    assert texts(write(tmp_path / "a.jsonl", '\ufeff{"text": "x"}\n')) == ["x"]


def test_columns_that_come_late_or_not_at_all(tmp_path):
    rows = '{"a": 1}\n{"text": "x", "b": {"c": "y"}}\n{"text": null}\n\n{"text": "z"}\n'
    assert texts(write(tmp_path / "a.jsonl", rows)) == ["x", "z"]
    assert texts(tmp_path / "a.jsonl", target_column="b.c") == ["y"]


def test_a_file_that_changes_is_read_again(tmp_path):
    assert texts(write(tmp_path / "a.csv", "text\nx\n")) == ["x"]
    assert texts(write(tmp_path / "a.csv", "text\ny\n")) == ["y"]


def test_csv_files_of_the_hub_are_read_as_text(tmp_path, monkeypatch):
    folder = write(tmp_path / "set" / "train.csv", "text,n\n007,NA\n1.50,\n").parent
    monkeypatch.setattr(data, "_local", lambda _: None)
    assert texts(folder) == ["007", "1.50"]
    assert texts(folder, target_column="n") == ["NA"]


# --- Names are no patterns


def test_names_that_look_like_patterns(tmp_path):
    for name in ("g1", "g2", "g[12]", "a b[1]*", "**"):
        write(tmp_path / name / "train.jsonl", json.dumps({"text": f"in {name}"}))
        write(tmp_path / name / "validation-0[1]-of-01.parquet", b"")
        parquet.write_table(pyarrow.table({"text": [f"of {name}"]}), tmp_path / name / "validation-0[1]-of-01.parquet")
    for name in ("g[12]", "a b[1]*", "**"):
        folder = str(tmp_path / name)
        assert texts(folder) == texts(tmp_path / name / "train.jsonl") == [f"in {name}"]
        assert load_text(folder, "validation", unconditional=True)["target"][:] == [f"of {name}"]
    assert not has_split(str(tmp_path / "g[12]"), "test")


# --- Files that are wrong

EMPTY = "data must have rows with text, got none in '{path}'"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *((f"a{ending}", b"", EMPTY) for ending in (".jsonl", ".json", ".csv", ".jsonl.gz")),
        ("a.jsonl", b"\n \n", EMPTY),
        ("a.json", b"[]", EMPTY),
        ("a.csv", b"text\n", EMPTY),
        ("a.parquet", b"", "data must be Parquet, got '{path}' behind row 0: "),
        ("a.parquet", b"PAR1 none PAR1", "data must be Parquet, got '{path}' behind row 0: "),
        (
            "a.jsonl", b'{"text": "a"}\n{"text": "\xe9t\xe9"}\n',
            "data must be UTF-8, got line 2 of {path}: .* can't decode byte 0xe9 in position 10",
        ),
        ("a.csv", b"text\na\n\xff\n", "data must be UTF-8, got line 3 of {path}: .* can't decode byte 0xff"),
        ("a.json", b'[\n{"text":\n"\xff"}]', "data must be UTF-8, got line 3 of {path}: .* can't decode byte 0xff"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "data must be JSON objects, got line 2 of {path}: Expecting ','"),
        ("a.jsonl", b'"text"', "data must be JSON objects, got line 1 of {path}: str"),
        ("a.json", b'[{"text": "a"},', "data must be JSON objects, got {path}: "),
        ("a.json", b'[{"text": "a"}, 3]', "data must be JSON objects, got row 2 of {path}: int"),
        ("a.jsonl", b"[" * 100_000, "data must be JSON objects, got {path}: "),
        ("a.jsonl", b'{"text": "\\ud800"}', "column 'text' must hold Unicode, got line 1 of {path}: "),
        ("a.csv", b"text,n\na,1\nb\n", "data must have 2 fields in every row, got 1 in line 3 of {path}"),
        ("a.csv", b"text\na,b\n", "data must have 1 fields in every row, got 2 in line 2 of {path}"),
        ("a.csv", b"text,text\na,b\n", r"data must have columns of different names, got \['text', 'text'\] in line 1"),
        ("a.csv", b'text\n"a\nb\n', "data must be CSV, got line 3 of {path}: unexpected end of data"),
        ("a.csv", b'text\n"He said" so\n', "data must be CSV, got line 2 of {path}: ',' expected after '\"'"),
        ("a.csv.gz", b"text\na\n", "data must be files that can be read, got '{path}': Not a gzipped file"),
        ("a.csv.gz", gzip.compress(b"text\na\n")[:-9], "data must be files that can be read, got '{path}': "),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("a.") else "",
)  # fmt: skip
def test_files_that_are_wrong(name, content, message, tmp_path):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message.replace("{path}", re.escape(str(path)))):
        texts(path)


def test_a_file_without_rows_among_others(tmp_path):
    for name, words in (("train", ["a"]), ("validation", [])):
        parquet.write_table(pyarrow.table({"text": pyarrow.array(words, "string")}), tmp_path / f"{name}.parquet")
    assert texts(tmp_path) == ["a"]
    with pytest.raises(ValueError, match=r"data must have rows with text, got none in '.*validation.parquet'"):
        load_text(str(tmp_path), "validation", unconditional=True)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), zlib.error("bad"), EOFError("short")])
def test_files_that_cannot_be_read(error, tmp_path, monkeypatch):
    def refuse(*_):
        raise error

    monkeypatch.setattr("smoothie_kernels.diffusion.reading.open", refuse, raising=False)
    write(tmp_path / "a.jsonl", b"{}")
    with pytest.raises(ValueError, match=rf"data must be files that can be read, got '.*a.jsonl': .*{error.args[-1]}"):
        texts(tmp_path / "a.jsonl")


def test_a_text_behind_the_first_rows_is_checked_too(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n' * 2_000 + '{"text": 3}\n')
    with pytest.raises(ValueError, match=f"column 'text' must hold strings, got int in line 2001 of {path}"):
        texts(path)
