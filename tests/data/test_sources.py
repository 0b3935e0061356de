from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lowmem.data.sources import Row, read_rows
from lowmem.errors import RecipeError
from lowmem.recipe.schema import SourceRecipe
from tests.data.recipes import jsonl

ROWS = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(7)]


def read(path: Path | None = None, format: str = "prompt_response", **keys: Any) -> list[Row]:
    source = SourceRecipe(path=str(path) if path else None, format=format, **keys)  # type: ignore[arg-type]
    return read_rows(source, seed=0, where="data.train")


def values(rows: list[Row]) -> list[Any]:
    assert all(row.problem is None for row in rows)
    return [row.value for row in rows]


def write_jsonl(path: Path) -> None:
    jsonl(path, ROWS)


def write_json_list(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=2))


def write_json_object(path: Path) -> None:
    path.write_text(json.dumps({"version": 1, "note": "x", "data": ROWS}))


def write_parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


KINDS = {
    "rows.jsonl": write_jsonl,
    "rows.ndjson": write_jsonl,
    "rows.json": write_json_list,
    "wrapped.json": write_json_object,
    "lines.json": write_jsonl,
    "rows.parquet": write_parquet,
    "no_suffix": write_jsonl,
    "no_suffix_list": write_json_list,
    "no_suffix_parquet": write_parquet,
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("compressed", ["no", "named .gz", "not named .gz"])
def test_every_kind_of_file_gives_the_same_rows_compressed_or_not(tmp_path, name, compressed):
    path = tmp_path / name
    KINDS[name](path)
    if compressed != "no":
        data = gzip.compress(path.read_bytes())
        path = path.with_name(path.name + ".gz") if compressed == "named .gz" else path
        path.write_bytes(data)
    assert values(read(path)) == ROWS


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path, name):
    path = tmp_path / name
    KINDS[name](path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert values(read(path)) == ROWS


def test_places_name_the_line(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    assert [row.place for row in read(path)] == [f"{path}:{n}" for n in range(1, 8)]
    path = tmp_path / "rows.json"
    path.write_text('[\n{"text": "a\\nb"},\n\n{"text":\n "c"}, {"text": "d"}\n]\n')
    lines = [f"{path}:2 (row 1)", f"{path}:4 (row 2)", f"{path}:5 (row 3)"]
    assert [row.place for row in read(path)] == lines


def test_a_text_file_is_one_document_with_its_blank_lines(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"First paragraph.\r\n\r\nSecond one.\r\n")
    assert values(read(path, "text")) == [{"text": "First paragraph.\n\nSecond one.\n"}]


def test_divider_lines_split_a_text_file_into_documents(tmp_path):
    path = tmp_path / "stories.txt.gz"
    text = "One.\nStill one.\n<|endoftext|>\n\n<|endoftext|>\nTwo with <|endoftext|> inside.\n<|endoftext|>\n"
    path.write_bytes(gzip.compress(text.encode()))
    rows = read(path, "text")
    assert values(rows) == [{"text": "One.\nStill one."}, {"text": "Two with <|endoftext|> inside."}]
    assert [row.place for row in rows] == [f"{path}:1", f"{path}:6"]


@pytest.mark.parametrize(("take", "count"), [(1, 1), (3.0, 3), (100, 7), (0.5, 3), (0.999, 6), (0.01, 1)])
def test_take_is_a_number_of_rows_or_a_fraction(tmp_path, take, count):
    assert values(read(jsonl(tmp_path / "rows.jsonl", ROWS), take=take)) == ROWS[:count]


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 2, 5])
def test_skip_and_take_divide_a_file_without_overlap_or_gap(tmp_path, part):
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    assert values(read(path, take=part)) + values(read(path, skip=part)) == ROWS


def test_take_counts_from_where_skip_ends(tmp_path):
    assert values(read(jsonl(tmp_path / "rows.jsonl", ROWS), skip=2, take=3)) == ROWS[2:5]
    assert values(read(tmp_path / "rows.jsonl", skip=0.5, take=2)) == ROWS[3:5]


def test_skipping_everything_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match=r"has no rows left after data\.train\.skip: 7"):
        read(jsonl(tmp_path / "rows.jsonl", ROWS), skip=7)


def test_take_that_is_neither_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"data\.train\.take: 2\.5 is neither"):
        read(jsonl(tmp_path / "rows.jsonl", ROWS), take=2.5)


def test_rows_that_cannot_be_read_carry_their_problem_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    deep = b"[" * 100_000
    path.write_bytes(b'{"a": 1}\n{"a": \n\n\xff{}\n' + deep + b'\n[1]\n{"a": 2}\n\n\n')
    rows = read(path)
    assert [(row.place, bool(row.problem)) for row in rows] == [
        (f"{path}:{n}", n in (2, 3, 4, 5)) for n in range(1, 8)
    ]
    assert "not valid JSON" in str(rows[1].problem)
    assert rows[2].problem == "the line is empty"
    assert rows[3].problem == "byte 0xff is not UTF-8"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "holds no rows"),
        ("x.json", b"", "holds no rows"),
        ("x.json", b" \n", "holds no rows"),
        ("x.json", b"[]", "holds no rows"),
        ("x.json", b'{"data": []}', "holds no rows"),
        ("x.txt", b" \n\n", "holds no rows"),
        ("x.json", b'[{"a": 1},\n {"a": }]', r"x\.json:2: not valid JSON at column 8"),
        ("x.json", b'[{"a": 1}\n {"a": 2}]', r"x\.json:2: .*expected , or \] after row 1"),
        ("x.json", b'[{"a": 1},\n{"a": 2}', r"x\.json:2: .*expected , or \] after row 2"),
        ("x.json", b'[{"a": 1},\n]', r"x\.json:2: not valid JSON"),
        ("x.json", b'[{"a": 1}]\n[', r"x\.json:2: .*behind the end of the list"),
        ("x.json", b'\n"words"', r"x\.json:1: .*list or an object"),
        ("x.json", b'{"a": [1], "b": [2]}', "exactly one list of rows, found lists under a, b"),
        ("x.json", b'{"a": 1}', "exactly one list of rows, found only a"),
        ("x.json", b'[\n{"a": "\xff"}]', r"x\.json:2: byte 0xff is not UTF-8"),
        ("x.txt", b"fine\nnot \xe9 fine", r"x\.txt:2: byte 0xe9 is not UTF-8"),
        ("x.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16"),
        ("x.parquet", b"PAR1 this is none", "not a readable Parquet file"),
    ],
)
def test_a_damaged_file_is_one_error_that_names_it(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        read(path, "text")


@pytest.mark.parametrize("cut", [1, 9, 40, 300])
def test_a_truncated_gzip_is_reported_with_the_line(tmp_path, cut):
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress("".join(f'{{"text": "{i * 7919}"}}\n' for i in range(300)).encode())
    path.write_bytes(whole[:-cut])
    with pytest.raises(RecipeError, match=r"rows\.jsonl\.gz:\d+: the gzip data is damaged or ends early"):
        read(path, "text")


def test_a_gzip_with_flipped_bits_is_reported(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    whole = bytearray(gzip.compress(b'{"text": "abc"}\n' * 50))
    whole[-6] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises(RecipeError, match="damaged"):
        read(path, "text")


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path):
    jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(RecipeError, match=r"data\.train\.path: .*Did you mean .*train\.jsonl\?"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(RecipeError, match="does not exist"):
        read(tmp_path / "nowhere" / "x.jsonl")


def test_a_folder_and_an_unknown_kind_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="is a folder"):
        read(tmp_path)
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RecipeError, match="neither JSONL, JSON nor Parquet"):
        read(tmp_path / "rows.csv")


def test_a_source_needs_exactly_one_origin_and_a_format(tmp_path):
    with pytest.raises(RecipeError, match="exactly one of path, hub and builtin; found none"):
        read()
    with pytest.raises(RecipeError, match="found path and hub"):
        read(tmp_path / "x.jsonl", hub="someone/something")
    with pytest.raises(RecipeError, match=r"data\.train\.format: is needed with path"):
        read_rows(SourceRecipe(path="x.jsonl"), seed=0, where="data.train")


@pytest.mark.parametrize("missing", ["pyarrow", "datasets"])
def test_a_missing_package_is_answered_with_the_install_command(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(RecipeError, match=r"pip install datasets"):
        if missing == "pyarrow":
            read(tmp_path / "rows.parquet")
        else:
            read(hub="someone/something")


def test_the_hub_is_asked_for_name_and_split_and_nothing_else(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    asked = []

    def load_dataset(*names: Any, **settings: Any) -> list[Any]:
        asked.append((names, settings))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read(hub="openai/gsm8k", name="main", split="test")
    assert values(rows) == ROWS
    assert rows[2].place == "openai/gsm8k[test] (row 3)"
    read(hub="openai/gsm8k")
    assert asked == [
        (("openai/gsm8k", "main"), {"split": "test"}),
        (("openai/gsm8k", None), {"split": "train"}),
    ]


def test_a_hub_that_cannot_be_reached_is_one_paragraph(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    def load_dataset(*names: Any, **settings: Any) -> None:
        raise ConnectionError("Couldn't reach 'a/b' on the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(RecipeError) as caught:
        read(hub="a/b")
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)
    assert "data.train.hub: a/b (name default, split train) cannot be loaded: ConnectionError" in str(
        caught.value
    )
