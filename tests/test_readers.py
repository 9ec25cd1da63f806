import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from splitfrozen.data.readers import LONGEST_FIELD, BadRow, Row, read_rows
from splitfrozen.errors import DataError

COLUMNS = {"text": "sentence", "label": "class"}


def read(
    source: Path | str, columns: Mapping[str, str] = COLUMNS
) -> tuple[list[Row], list[BadRow]]:
    bad: list[BadRow] = []
    return list(read_rows(str(source), columns, bad.append)), bad


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def values(rows: list[Row]) -> list[tuple[object, ...]]:
    return [(row.line, row.values["text"], row.values["label"]) for row in rows]


# --- CSV -----------------------------------------------------------------------------------------


def test_csv(tmp_path: Path):
    path = write(tmp_path, "a.csv", 'id,class,sentence\n1,no,hello there\n2,yes,"a, ""b"""\n')
    rows, bad = read(path)
    assert values(rows) == [(2, "hello there", "no"), (3, 'a, "b"', "yes")]
    assert rows[0].file == str(path)
    assert set(rows[0].values) == {"text", "label"}
    assert not bad


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffsentence,class\nünï,1\n",
        "sentence,class\r\nünï,1\r\n",
        "sentence,class\rünï,1\r",
        "\n\nsentence,class\n\nünï,1",
    ],
)
def test_csv_marks_and_line_ends(tmp_path: Path, content: str):
    rows, bad = read(write(tmp_path, "a.csv", content))
    assert [row.values for row in rows] == [{"text": "ünï", "label": "1"}]
    assert not bad


def test_csv_lines_are_physical_lines_where_rows_start(tmp_path: Path):
    content = 'sentence,class\n"one\ntwo\n\nthree",1\n\nfour,2\n"five\r\nsix",3\nseven,4\n'
    rows, bad = read(write(tmp_path, "a.csv", content))
    assert values(rows) == [
        (2, "one\ntwo\n\nthree", "1"),
        (7, "four", "2"),
        (8, "five\r\nsix", "3"),
        (10, "seven", "4"),
    ]
    assert not bad


def test_tsv(tmp_path: Path):
    rows, _ = read(write(tmp_path, "a.TSV", "sentence\tclass\na, b\t1\n"))
    assert values(rows) == [(2, "a, b", "1")]


def test_bad_csv_rows_are_reported_by_line_and_stop_nothing(tmp_path: Path):
    content = b'sentence,class\ngood,1\nshort\nlong,1,2\nwr\xffng,1\nst"range,1\n"o"dd,1\ngood,2\n'
    path = write(tmp_path, "a.csv", content)
    rows, bad = read(path)
    assert values(rows) == [(2, "good", "1"), (6, 'st"range', "1"), (8, "good", "2")]
    assert [row.line for row in bad] == [3, 4, 5, 7]
    assert "1 fields, where the header has 2" in bad[0].reason
    assert "3 fields" in bad[1].reason
    assert "`text` is not UTF-8" in bad[2].reason
    assert "not CSV" in bad[3].reason
    assert str(bad[0]) == f"{path}:3: {bad[0].reason}"


def test_an_open_quote_is_not_silently_a_row(tmp_path: Path):
    rows, bad = read(write(tmp_path, "a.csv", 'sentence,class\ngood,1\n"open,1\ngood,2\n'))
    assert values(rows) == [(2, "good", "1")]
    assert [row.line for row in bad] == [3]


@pytest.mark.parametrize("end", ['"', ""])
def test_what_stands_in_quotes_never_becomes_a_row(tmp_path: Path, end: str):
    swallowed = "open,1\n" + "some words that go on,1\n" * 20_000
    rows, bad = read(write(tmp_path, "a.csv", f'sentence,class\ngood,1\n"{swallowed}{end},2\n'))
    assert values(rows)[0] == (2, "good", "1")
    if end:
        assert values(rows)[1:] == [(3, swallowed, "2")]
        assert not bad
    else:
        assert len(rows) == 1
        assert [row.line for row in bad] == [3]
        assert "is a quote of it open to the end?" in bad[0].reason


def test_a_field_without_end_stops_the_reading(tmp_path: Path):
    line = b"some words that go on,1\n"
    content = b'sentence,class\ngood,1\n"open,1\n' + line * (LONGEST_FIELD // len(line) + 1)
    path, bad, rows = write(tmp_path, "a.csv", content), [], []
    with pytest.raises(DataError, match=r"line 3; allowed: .*is there a quote without its end\?"):
        rows += read_rows(str(path), COLUMNS, bad.append)
    assert [row.line for row in bad] == [3]
    path.unlink()


def test_strict_is_a_report_that_raises(tmp_path: Path):
    path = write(tmp_path, "a.csv", "sentence,class\ngood,1\nshort\ngood,2\n")

    def refuse(bad: BadRow) -> None:
        raise DataError(str(bad), got="", allowed="", remedy="")

    rows = read_rows(str(path), COLUMNS, refuse)
    assert next(rows).line == 2
    with pytest.raises(DataError, match=r"a\.csv:3"):
        next(rows)


def test_csv_is_streamed(tmp_path: Path):
    path = write(tmp_path, "a.csv", "sentence,class\n" + "good,1\n" * 50_000)
    rows = read_rows(str(path), COLUMNS, print)
    assert next(rows).line == 2
    with path.open("ab") as file:
        file.write(b"late,2\n")
    assert [row.values["text"] for row in rows][-1] == "late"


# --- JSON lines ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson"])
def test_json_lines(tmp_path: Path, name: str):
    content = '\ufeff{"sentence": "a\\nb", "class": 1, "more": null}\r\n\r\n'
    content += '{"class": 2.0, "sentence": "ü"}'
    rows, bad = read(write(tmp_path, name, content))
    assert values(rows) == [(1, "a\nb", 1), (3, "ü", 2.0)]
    assert not bad


def test_bad_json_lines_are_reported_and_stop_nothing(tmp_path: Path):
    good = json.dumps({"sentence": "good", "class": 1})
    lines = [
        b'{"sentence": "no class"}',
        good.encode(),
        b"{broken",
        b"17",
        b"[1, 2]",
        b"[" * 100_000,
        b'{"sentence": "\xff", "class": 1}',
        b'{"sentence": "\\ud800", "class": 1}',
        b'{"sentence": "big", "class": ' + b"9" * 5000 + b"}",
        good.encode(),
    ]
    rows, bad = read(write(tmp_path, "a.jsonl", b"\n".join(lines)))
    assert [row.line for row in rows] == [2, 10]
    assert [row.line for row in bad] == [1, 3, 4, 5, 6, 7, 8, 9]
    assert bad[0].reason == "no 'class'"
    assert "not JSON" in bad[1].reason
    assert "not a JSON object" in bad[2].reason


def test_a_json_array_is_named(tmp_path: Path):
    for content in ('[{"sentence": "a", "class": 1}]', '[\n{"sentence": "a",\n "class": 1}\n]'):
        with pytest.raises(DataError, match="a JSON array"):
            read(write(tmp_path, "a.json", content))


# --- what cannot be used at all ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "Sentense,class\na,1\n"),
        ("a.jsonl", '{"Sentense": "a", "class": 1}\n' * 30),
    ],
)
def test_a_missing_column_names_the_columns_and_the_nearest(
    tmp_path: Path, name: str, content: str
):
    path = write(tmp_path, name, content)
    match = (
        r"no column 'sentence' for `text`: got columns 'Sentense', 'class'.*did you mean 'Sentense'"
    )
    with pytest.raises(DataError, match=match):
        read(path)


def test_a_column_that_is_there_twice(tmp_path: Path):
    with pytest.raises(DataError, match="more than one column 'class'"):
        read(write(tmp_path, "a.csv", "sentence,class,class\na,1,2\n"))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.npz"])
@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file(tmp_path: Path, name: str, content: bytes):
    with pytest.raises(DataError, match=f"cannot read .*{name}"):
        read(write(tmp_path, name, content))


def test_only_a_header_is_no_rows(tmp_path: Path):
    assert read(write(tmp_path, "a.csv", "sentence,class\n")) == ([], [])


def test_utf16_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="got UTF-16"):
        read(write(tmp_path, "a.csv", "sentence,class\na,1\n".encode("utf-16")))


def test_no_such_file_fails_before_the_first_row(tmp_path: Path):
    for source in (tmp_path / "no.csv", tmp_path / "no folder", "no.csv", "nothing"):
        with pytest.raises(DataError, match="there is no such data"):
            read_rows(str(source), COLUMNS, print)
    with pytest.raises(DataError, match="unknown format"):
        read_rows(str(write(tmp_path, "a.xlsx", b"PK")), COLUMNS, print)
    with pytest.raises(DataError, match="unknown format"):
        read_rows(f"{write(tmp_path, 'a.csv', b'a')}#train", COLUMNS, print)


# --- arrays --------------------------------------------------------------------------------------

ARRAYS = {"pixels": "image", "label": "digit"}


def test_npz(tmp_path: Path):
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    np.savez_compressed(tmp_path / "a.npz", image=images, digit=np.array([3, 1]), other=np.ones(9))
    rows, bad = read(tmp_path / "a.npz", ARRAYS)
    assert [(row.line, row.values["label"]) for row in rows] == [(1, 3), (2, 1)]
    assert isinstance(rows[0].values["label"], int)
    assert np.array_equal(np.stack([row.values["pixels"] for row in rows]), images)
    assert not bad


def test_npz_with_names_as_labels(tmp_path: Path):
    np.savez(tmp_path / "a.npz", image=np.zeros((1, 2, 2, 1), np.uint8), digit=np.array(["three"]))
    assert read(tmp_path / "a.npz", ARRAYS)[0][0].values["label"] == "three"


def test_npz_that_cannot_be_used(tmp_path: Path):
    path = tmp_path / "a.npz"
    np.savez(path, image=np.zeros((2, 4)), digit=np.zeros(3))
    with pytest.raises(DataError, match="image of 2, digit of 3"):
        read(path, ARRAYS)
    np.savez(path, image=np.zeros((2, 4)), digits=np.zeros(2))
    with pytest.raises(DataError, match="did you mean 'digits'"):
        read(path, ARRAYS)
    np.savez(path, image=np.zeros((2, 4)), digit=np.array([{}, None], dtype=object))
    with pytest.raises(DataError, match="without objects"):
        read(path, ARRAYS)
    np.savez(path, image=np.float32(1), digit=np.float32(1))
    with pytest.raises(DataError, match="image of 0"):
        read(path, ARRAYS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(DataError, match="cannot read"):
        read(path, ARRAYS)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image", b"no array")
        archive.writestr("digit", b"no array")
    with pytest.raises(DataError, match="got 'image', which is no array"):
        read(path, ARRAYS)


# --- datasets ------------------------------------------------------------------------------------


def test_a_datasets_folder(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_dict({"sentence": ["a", "b"], "class": [0, 1], "x": [1.0, 2.0]})
    test = datasets.Dataset.from_dict({"sentence": ["c"], "class": [1]})
    train.save_to_disk(tmp_path / "one")
    both = datasets.DatasetDict({"train": train, "test": test})
    both.save_to_disk(tmp_path / "two")
    datasets.DatasetDict({"x": train, "test": test}).save_to_disk(tmp_path / "unclear")

    assert values(read(tmp_path / "one")[0]) == [(1, "a", 0), (2, "b", 1)]
    assert values(read(tmp_path / "two")[0]) == [(1, "a", 0), (2, "b", 1)]
    assert values(read(f"{tmp_path / 'two'}#test")[0]) == [(1, "c", 1)]
    with pytest.raises(DataError, match="'dev'; allowed: train, test"):
        read(f"{tmp_path / 'two'}#dev")
    with pytest.raises(DataError, match=r"write .*unclear#x"):
        read(tmp_path / "unclear")
    with pytest.raises(DataError, match="got columns 'sentence', 'class', 'x'"):
        read(tmp_path / "one", {"text": "sentences"})
    with pytest.raises(DataError, match="save_to_disk"):
        read(tmp_path)


def test_without_datasets_the_command_that_installs_it_is_named(tmp_path: Path):
    program = (
        "import sys; sys.modules['datasets'] = None\n"
        "from splitfrozen.data.readers import read_rows\n"
        "from splitfrozen.errors import DataError\n"
        "try: read_rows(sys.argv[1], {}, print)\n"
        "except DataError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "pip install 'splitfrozen[datasets]'" in done.stdout
