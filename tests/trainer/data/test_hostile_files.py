"""Files that are damaged, enormous or made to hurt: each is read, or refused with its place and the reason."""

import gzip
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from pyarrow import ipc

from finetune_trainer.data import arrow_bounds, data_files
from finetune_trainer.data.rows import Row, read_rows

ROWS = [{"prompt": f"p{number}", "completion": 'c "x",\nz é'} for number in range(300)]
LINES = "\n".join(map(json.dumps, ROWS)).encode()


def read(path: Path, content: bytes) -> list[Row]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return list(read_rows((path,)))


def zstd(content: bytes) -> bytes:
    sink = arrow.BufferOutputStream()
    with arrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


SAME = {
    "gzip": ("a.jsonl.gz", gzip.compress(LINES)),
    "zstd": ("a.jsonl.zst", zstd(LINES)),
    "a packed list": ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())),
    "a list over many lines": ("a.json", json.dumps(ROWS, indent=2).encode()),
    "lines in a .json file": ("a.json", LINES),
    "a byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + LINES),
    "a byte order mark in a list": ("a.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
    "CRLF": ("a.jsonl", LINES.replace(b"\n", b"\r\n")),
    "gzip in several members": ("a.jsonl.gz", gzip.compress(LINES + b"\n") + gzip.compress(b"\n\n")),
    "empty lines": ("a.jsonl", b"\n" * 100_000 + LINES + b"\r\n" * 100_000),
}


@pytest.mark.parametrize(("name", "content"), SAME.values(), ids=SAME)
def test_the_same_rows_come_from_every_packing(tmp_path: Path, name: str, content: bytes) -> None:
    assert [row.value for row in read(tmp_path / name, content)] == ROWS


def test_arrow_files_of_both_forms_and_tables_are_read(tmp_path: Path) -> None:
    table = arrow.Table.from_pylist(ROWS)
    with ipc.new_stream(tmp_path / "stream.arrow", table.schema) as stream:
        stream.write_table(table)
    with ipc.new_file(tmp_path / "file.arrow", table.schema) as file:
        file.write_table(table)
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\na\tb\n")
    for name in ("stream.arrow", "file.arrow"):
        assert [row.value for row in read_rows((tmp_path / name,))] == ROWS
    assert [row.value for row in read_rows((tmp_path / "a.tsv",))] == [{"prompt": "a", "completion": "b"}]


def test_objects_of_a_column_do_not_get_each_others_keys(tmp_path: Path) -> None:
    rows = [{"calls": [{"a": 1}]}, {"calls": [{"b": 2}]}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row.value for row in read_rows((tmp_path / "a.parquet",))] == rows


def zip_archive() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../../a.jsonl", '{"text": "a"}\n')
    return packed.getvalue()


def tar_archive() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        link = tarfile.TarInfo("../a.jsonl")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return packed.getvalue()


REFUSED = {
    "a ZIP archive": ("a.jsonl", zip_archive(), "a.jsonl: is a ZIP archive: unpack it"),
    "a ZIP archive as CSV": ("a.csv", zip_archive(), "a.csv: is a ZIP archive"),
    "a ZIP archive as Parquet": ("a.parquet", zip_archive(), "not a valid Parquet file"),
    "a tar archive": ("a.json", tar_archive(), "a.json: is a tar archive"),
    "a packed tar archive": ("a.csv.gz", gzip.compress(tar_archive()), "a.csv.gz: is a tar archive"),
    "gzip within gzip": (
        "a.jsonl.gz",
        gzip.compress(gzip.compress(LINES)),
        "is compressed with gzip: compress it once only",
    ),
    "zstd within gzip": ("a.jsonl.gz", gzip.compress(zstd(LINES)), "is compressed with zstd: compress it once only"),
    "gzip without its suffix": ("a.jsonl", gzip.compress(LINES), "name it .gz"),
    "bytes after gzip": ("a.jsonl.gz", gzip.compress(b"{}\n") + b"more", "cannot be unpacked"),
    "Parquet by another name": ("a.jsonl", b"PAR1" + LINES, "name it .parquet"),
    "a pickle": ("a.jsonl", b"\x80\x04\x95", "not UTF-8: byte 0x80"),
    "CSV in UTF-16": ("a.csv", "text\na\n".encode("utf-16"), "UTF-16 text: save it as UTF-8"),
    "a CSV header that is no text": ("a.csv", b"te\x00xt\na\n", "a.csv:1: the header has characters that are not text"),
    "a CSV header that is not UTF-8": ("a.csv", b"t\xe9xt\na\n", "a.csv:1: the header has characters"),
    "a CSV quote without end": ("a.csv", b'text\n"' + b"a\n" * 1000, "a.csv:2: not valid CSV: unexpected end"),
    "a NUL in JSON": ("a.jsonl", b'{"text": "a\x00b"}', "not valid JSON: Invalid control character"),
    "lines ended as on old Macs": ("a.jsonl", b'{"a": 1}\r{"a": 2}\r', "not valid JSON: Extra data"),
    "NaN": ("a.jsonl", b'{"text": NaN}', "a.jsonl:1: not valid JSON: NaN is not a JSON value"),
    "infinity by an exponent": ("a.jsonl", b'{"text": 1e999}', "larger than any number"),
    "half a surrogate pair": ("a.jsonl", b'{}\n{"text": "\\ud83d"}', "a.jsonl:2: not valid JSON: \\ud83d is half"),
    "half a pair in a list": ("a.json", b'[{"text": "\\uDC00"}]', "entry 1 is not valid JSON: \\udc00 is half"),
    "a surrogate in bytes": ("a.jsonl", b'{"text": "\xed\xa0\x80"}', "not UTF-8: byte 0xed"),
    "a million brackets": ("a.jsonl", b"[" * 1_000_000, "nested too deeply"),
    "a number of a million digits": ("a.jsonl", b"1" * 1_000_000, "a.jsonl:1: not valid JSON"),
    "brackets in a list": ("a.json", b"[" * 1_000_000, "nested too deeply"),
    "a key twice in a list": ("a.json", b'[{"a": 1, "a": 2}]', "'a' is written twice"),
    "a list without end": ("a.json", b'[{"a": 1}', "the list has no end"),
    "a list without commas": ("a.json", b'[{"a": 1} {"a": 2}]', "missing after entry 1"),
    "UTF-16": ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16 text"),
    "a CSV column twice": ("a.csv", b"text,text\na,b\n", "columns are named twice"),
    "a CSV row that is not UTF-8": ("a.csv", b"text\na\n\xff\nb\n", "a.csv:3: not valid CSV: the row is not UTF-8"),
    "gzip cut short": ("a.jsonl.gz", gzip.compress(LINES)[:-20], "a.jsonl.gz"),
    "no gzip at all": ("a.jsonl.gz", LINES, "cannot be unpacked"),
    "no zstd at all": ("a.jsonl.zst", LINES, "cannot be unpacked"),
    "no Arrow at all": ("a.arrow", LINES, "not a valid Arrow file"),
    "an empty Arrow file": ("a.arrow", b"", "not a valid Arrow file"),
}


@pytest.mark.parametrize(("name", "content", "part"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, part: str) -> None:
    broken = [row for row in read(tmp_path / name, content) if row.is_broken]
    assert len(broken) == 1
    assert part in f"{broken[0].location}: {broken[0].value}"


def test_rows_after_a_bad_csv_row_are_read(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.csv", b'text\na\n"b"x\nc\n')
    assert [row.is_broken for row in rows] == [False, True, False]


@pytest.mark.parametrize("damage", range(0, 400, 8))
def test_a_damaged_arrow_file_never_crashes(tmp_path: Path, damage: int) -> None:
    table = arrow.Table.from_pylist(ROWS[:3])
    sink = arrow.BufferOutputStream()
    with ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    content = bytearray(bytes(sink.getvalue()))
    content[-1 - damage % len(content)] ^= 0xFF
    assert isinstance(read(tmp_path / "a.arrow", bytes(content)), list)


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gzip", "zstd"])
def test_a_bomb_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: object) -> None:
    monkeypatch.setattr(data_files, "RATIO_FREE_BYTES", 2**20)
    assert callable(pack)
    suffix = ".gz" if pack is gzip.compress else ".zst"
    rows = read(tmp_path / f"a.jsonl{suffix}", pack(b"\n" * 50 * 2**20))
    assert "decompression bomb" in rows[0].value
    assert read(tmp_path / f"b.jsonl{suffix}", pack(LINES * 10))[-1].is_broken is False


def test_files_of_the_same_name_have_different_places(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        read(tmp_path / folder / "rows.jsonl", b'{"text": "x"}')
    places = [row.location for row in read_rows((tmp_path / "a/rows.jsonl", tmp_path / "b/rows.jsonl"))]
    assert places == ["a/rows.jsonl:1", "b/rows.jsonl:1"]


def test_a_list_is_streamed_and_a_row_without_end_refused(tmp_path: Path) -> None:
    """128 MiB of list, and a line of 100 MiB, in a process that adds less than 300 MiB."""
    row = json.dumps({"text": "b" * 4000})
    with (tmp_path / "a.json").open("w") as file:
        file.write("[" + ",".join([row] * (128 * 2**20 // len(row))) + "]")
    (tmp_path / "b.jsonl").write_bytes(b'"' + b"x" * 100 * 2**20 + b'"\n{"text": "a"}\n')
    code = """
import resource, sys
from pathlib import Path
from finetune_trainer.data.rows import read_rows
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = sum(not row.is_broken for row in read_rows((Path(sys.argv[1]),)))
middle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = list(read_rows((Path(sys.argv[2]),)))
print(rows, (middle - before) >> 10, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
assert "longer than 64 MiB" in found[0].value and found[1].location == "b.jsonl:2"
"""
    command = [sys.executable, "-c", code, str(tmp_path / "a.json"), str(tmp_path / "b.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows, list_mib, line_mib = map(int, done.stdout.split())
    assert rows == 128 * 2**20 // len(row)
    assert list_mib < 32
    assert line_mib < 300


def measured(code: str, *paths: Path) -> list[int]:
    """What the code prints, with the process's memory in MiB at the end."""
    head = "import resource, sys\nfrom pathlib import Path\nfrom finetune_trainer.data.rows import read_rows\n"
    head += (
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\npaths = [Path(path) for path in sys.argv[1:]]\n"
    )
    tail = "\nprint((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)"
    command = [sys.executable, "-c", head + code + tail, *map(str, paths)]
    return [int(word) for word in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]


def test_millions_of_empty_rows_take_no_memory(tmp_path: Path) -> None:
    """Blank lines, and rows without columns. A list of them would be seen: 24 MB of references, 32 MB of rows."""
    (tmp_path / "blank.jsonl").write_bytes(b"\n" * 3_000_000)
    (tmp_path / "blank.csv").write_bytes(b"text\n" + b"\r\n" * 3_000_000)
    (tmp_path / "empty.jsonl").write_bytes(b"{}\n" * 500_000)
    code = "for path in paths: print(sum(1 for _ in read_rows((path,))))"
    *rows, added = measured(code, *sorted(tmp_path.iterdir()))
    assert rows == [0, 0, 500_000]
    assert added < 16


def test_a_row_of_fifty_megabytes_is_read_from_every_kind_of_file(tmp_path: Path) -> None:
    """Memory is a few copies of the row; Arrow's own copies of a column come on top."""
    text = "a" * 50 * 2**20
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "b.json").write_text(json.dumps([{"text": text}]))
    (tmp_path / "c.csv").write_text(f"text\n{text}\n")
    parquet.write_table(arrow.table({"text": [text]}), tmp_path / "d.parquet", write_statistics=False)
    code = "for path in paths: print(sum(len(row.value['text']) for row in read_rows((path,))))"
    *lengths, added = measured(code, *sorted(tmp_path.iterdir()))
    assert lengths == [len(text)] * 4
    assert added < 400


def test_a_small_parquet_file_that_repeats_a_large_text_is_read_in_bounds(tmp_path: Path) -> None:
    """0.2 MB that stand for 400 MB in 200 rows; read 512 rows at a time, they took all of it at once."""
    repeated = arrow.DictionaryArray.from_arrays(arrow.array([0] * 200, arrow.int32()), arrow.array(["x" * 2_000_000]))
    table = arrow.table({"parts": arrow.ListArray.from_arrays(list(range(201)), repeated)})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path, dictionary_pagesize_limit=2**30, store_schema=False)
    assert path.stat().st_size < 2**20
    length, added = measured("print(sum(len(row.value['parts'][0]) for row in read_rows((paths[0],))))", path)
    assert length == 200 * 2_000_000
    assert added < 200


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_an_arrow_batch_that_unpacks_to_gigabytes_is_refused_before_it_is(
    tmp_path: Path, kind: str, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 MB of one letter; the control is read where the bound allows it, and so is a table in smaller batches."""
    text = "x" * 3_000_000
    table = arrow.table({"text": [text] * 100})
    options = ipc.IpcWriteOptions(compression=codec)
    write = ipc.new_file if kind == "file" else ipc.new_stream
    for name, rows in (("one.arrow", 100), ("ten.arrow", 10)):
        with write(tmp_path / name, table.schema, options=options) as out:
            out.write_table(table, max_chunksize=rows)
    assert (tmp_path / "one.arrow").stat().st_size < 2**21
    (refused,) = read_rows((tmp_path / "one.arrow",))
    assert "a batch unpacks to 286 MiB, but at most 256 MiB are unpacked" in refused.value
    assert len(list(read_rows((tmp_path / "ten.arrow",)))) == 100
    monkeypatch.setattr(arrow_bounds, "MAX_BATCH_BYTES", 2**29)
    assert len(list(read_rows((tmp_path / "one.arrow",)))) == 100


def test_a_packed_dictionary_of_an_arrow_file_is_bounded_too(tmp_path: Path) -> None:
    column = arrow.array(["x" * 3_000_000 + str(number) for number in range(100)]).dictionary_encode()
    with ipc.new_file(
        tmp_path / "a.arrow", arrow.schema([("text", column.type)]), options=ipc.IpcWriteOptions(compression="zstd")
    ) as out:
        out.write_table(arrow.table({"text": column}))
    (refused,) = read_rows((tmp_path / "a.arrow",))
    assert "a batch unpacks to 286 MiB" in refused.value
