"""CSVs as people have them."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.csvfile import CsvFile
from worker.model import InvalidMessages, Message, Problem


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "people.csv"
    path.write_bytes(content)
    return path


def refused(path: Path, encoding: str = "utf-8-sig") -> Problem:
    with pytest.raises(InvalidMessages) as caught:
        list(CsvFile(path, encoding=encoding))
    (problem,) = caught.value.problems
    assert problem.row == 0
    return problem


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (b"to,name\nann@example.com,Ann\n", "utf-8"),
        (b"to;name\r\nann@example.com;Ann\r\n", "utf-8"),
        (b"to\tname\nann@example.com\tAnn", "utf-8"),
        (b"\xef\xbb\xbfTO , name\n ann@example.com ,Ann\n", "utf-8"),
        (b'"to","name"\n\n"ann@example.com","Ann"\n,\n\n', "utf-8"),
        ("to,name\nann@example.com,Ann\n".encode("utf-16"), "utf-16"),
        (b"\n\nto,name,\nann@example.com,Ann,\n", "utf-8"),
    ],
)
def test_all_usual_kinds_say_the_same(tmp_path: Path, content: bytes, encoding: str):
    """Comma, semicolon, tab, byte order mark, quotes, blank lines, a comma too many at the end."""
    file = CsvFile(written(tmp_path, content), encoding=encoding)
    assert list(file) == [Message(to="ann@example.com", variables={"name": "Ann"})]


def test_what_stands_in_quotes_parts_no_columns(tmp_path: Path):
    """More semicolons than commas, and all of them in one column's name."""
    file = CsvFile(written(tmp_path, b'to,"a;b;c"\nann@example.com,Ann\n'))
    assert list(file) == [Message(to="ann@example.com", variables={"a;b;c": "Ann"})]


def test_a_column_goes_by_the_template_s_name_whatever_its_case(tmp_path: Path):
    """The header is a person's, the template another's; the address is a variable where wanted.
    What the template does not ask for is left out.
    """
    path = written(tmp_path, b"To,First Name,AMOUNT\nann@example.com,Ann,5\n")
    (message,) = CsvFile(path, wanted={"amount", "to"})
    assert isinstance(message, Message)
    assert message.variables == {"to": "ann@example.com", "amount": "5"}


def test_a_row_that_is_no_row_is_a_problem_of_its_own_with_its_line(tmp_path: Path):
    """The others are read: `--skip-invalid` must not stop at it."""
    content = (
        b'to,name\n"a@example.com","two\nlines"\nb@example.com\nc@example.com,C,extra\n'
        b"d@example.com,D\n"
    )
    file = CsvFile(written(tmp_path, content))
    found = list(file.numbered())
    assert [line for line, _ in found] == [2, 4, 5, 6]
    assert [p.path for _, p in found if isinstance(p, Problem)] == ["line 4", "line 5"]
    assert [p.detail for _, p in found if isinstance(p, Problem)] == [
        "too few fields: 1, the header has 2", "too many fields: 3, the header has 2",
    ]  # fmt: skip
    assert [p.row for _, p in found if isinstance(p, Problem)] == [2, 3]
    assert file.line_of(4) == 6
    assert file.line_of(5) is None


def test_another_encoding_is_said_with_its_line_and_read_when_named(tmp_path: Path):
    """Windows' own encoding is the usual accident."""
    path = written(tmp_path, "to,name\na@example.com,Ann\nb@example.com,Jürgen\n".encode("cp1252"))
    first, second = CsvFile(path)
    assert isinstance(first, Message)
    assert isinstance(second, Problem)
    assert (second.code, second.path) == ("CSV_ENCODING", "line 3")
    assert "--encoding" in second.detail
    named = list(CsvFile(path, encoding="windows-1252"))[1]
    assert isinstance(named, Message)
    assert named.variables["name"] == "Jürgen"


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (b"", "CSV_EMPTY", "is empty"), (b"\n \n", "CSV_EMPTY", "is empty"),
        (b"to,name\n", "CSV_EMPTY", "no rows"), (b"email,name\na@b.com,A\n", "CSV_COLUMNS", "`to`"),
        (b"to,TO\na@b.com,x\n", "CSV_COLUMNS", "twice"),
        (b'to,name\na@b.com,"open\n', "CSV_SYNTAX", "unexpected end"),
        (b"to,name\na@b.com," + b"x" * 1_000_001, "CSV_SYNTAX", "field larger"),
        (b"to,na\xffme\na@b.com,A\n", "CSV_ENCODING", "is not utf-8"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_as_a_whole_is_refused(
    tmp_path: Path, content: bytes, code: str, says: str
):
    """One problem, of row 0, that says what to mend."""
    problem = refused(written(tmp_path, content))
    assert problem.code == code
    assert says in problem.detail


def test_a_file_that_is_not_there_and_an_encoding_that_is_none_are_refused(tmp_path: Path):
    """No traceback for a slip of the finger."""
    assert refused(tmp_path / "absent.csv").detail == "cannot be read: No such file or directory"
    assert refused(tmp_path).code == "CSV_FILE"
    path = written(tmp_path, b"to\na@b.com\n")
    assert refused(path, "utf-9").code == refused(path, "base64").code == "CSV_ENCODING"
    assert refused(path, "utf-16").code == "CSV_ENCODING"


def test_a_large_file_is_read_in_flat_memory(tmp_path: Path):
    """A stream: what was read is not kept."""
    path = written(tmp_path, b"to,name\n" + b"ann@example.com,Ann\n" * 200_000)
    tracemalloc.start()
    count = sum(1 for _ in CsvFile(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 200_000
    assert peak < 1_000_000


@given(st.binary(max_size=200) | st.text(",;\t\n\r\"to@x. \x00é", max_size=80).map(str.encode),
       st.sampled_from(["utf-8", "utf-16", "cp1252", "shift_jis"]))  # fmt: skip
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_file_raises_anything_else(tmp_path: Path, content: bytes, encoding: str):
    """Whatever the bytes: messages, problems, or InvalidMessages."""
    path = written(tmp_path, b"to,name\n" + content if content[:1] == b"a" else content)
    try:
        found = list(CsvFile(path, encoding=encoding))
    except InvalidMessages:
        pass
    else:
        assert all(isinstance(one, Message | Problem) for one in found)
