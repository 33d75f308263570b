"""One reader of tables: CSV, TSV, JSON lines and JSON arrays; labels are canonical; messages name file and row."""

import json

import pytest

from hf_iai import episodes_from_labels
from hf_iai.data.tables import label_of, labelled_rows, table_rows

HI = [{"text": "hi", "label": "a"}]
READ = {
    "plain.csv": (b"text,label\nhi,a\n", HI),
    "bom.csv": (b"\xef\xbb\xbftext,label\nhi,a\n", HI),
    "windows.csv": (b"text,label\r\nhi,a\r\n", HI),
    "UPPER.CSV": (b"text,label\nhi,a\n", HI),
    "tabs.tsv": (b"text\tlabel\nhi\ta\n", HI),
    "quoted.csv": (b'text,label\n"a, b\nc",a\n', [{"text": "a, b\nc", "label": "a"}]),
    "spaces.csv": (b" text , label\nhi, a \n", HI),
    "more.csv": (b"id,text,label,note\n1,hi,a,\n", HI),
    "blank.csv": (b"text,label\n\nhi,a\n\n", HI),
    "na.csv": (b"text,label\nNA,None\n", [{"text": "NA", "label": "None"}]),
    "long.csv": (b"text,label\n" + b"x" * 200_000 + b",a\n", [{"text": "x" * 200_000, "label": "a"}]),
    "zeros.csv": (b"text,label\nhi,007\n", [{"text": "hi", "label": "007"}]),
    "whole.csv": (b"text,label\nhi,1.0\nho,2\n", [{"text": "hi", "label": "1"}, {"text": "ho", "label": "2"}]),
    "parts.csv": (b"text,label\nhi,1.0\nho,2.5\n", [{"text": "hi", "label": "1.0"}, {"text": "ho", "label": "2.5"}]),
    "true.csv": (b"text,label\nhi,TRUE\n", [{"text": "hi", "label": "true"}]),
    "plain.jsonl": (b'{"text": "hi", "label": "a"}\n\n', HI),
    "bom.jsonl": (b'\xef\xbb\xbf{"text": "hi", "label": "a"}\n', HI),
    "other.NDJSON": (b'{"text": "hi", "label": "a"}\n', HI),
    "array.json": (b'[{"text": "hi", "label": "a"}]', HI),
    "lines.json": (b'{"text": "hi", "label": "a"}\n', HI),
    "true.jsonl": (b'{"text": "hi", "label": true}\n', [{"text": "hi", "label": "true"}]),
    "numbers.jsonl": (b'{"text": 5, "label": 1.0}\n{"text": "ho", "label": 2}\n',
                      [{"text": "5", "label": "1"}, {"text": "ho", "label": "2"}]),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_what_is_read(tmp_path, name):
    content, expected = READ[name]
    (tmp_path / name).write_bytes(content)
    assert labelled_rows(tmp_path / name) == expected


REFUSED = {
    "comma.csv": (b"text,label\nhello, world,greeting\n", "row 1 of .* has 3 fields, the header 2"),
    "later.csv": (b"text,label\nhi,a\nhello, world,greeting\n", "row 2 of .* has 3 fields, the header 2"),
    "short.csv": (b"text,label\nhi\n", "row 1 of .*: 'label' is None"),
    "empty-cell.csv": (b"text,label\nhi,\n", "row 1 of .*: 'label' is None"),
    "blank-cell.csv": (b"text,label\n   ,a\n", "row 1 of .*: 'text' is '   '"),
    "quote.csv": (b'text,label\n"hi,a\n', "quote.csv is no table"),
    "latin.csv": (b"text,label\n\xff,a\n", "latin.csv is not UTF-8 text"),
    "twice.csv": (b"text,label,text\nhi,a,ho\n", "twice.csv has the column 'text' more than once"),
    "semicolon.csv": (b"text;label\nhi;a\n", r"row 1 of .*; its columns are \['text;label'\]"),
    "empty.csv": (b"", "empty.csv has no row"),
    "header.csv": (b"text,label\n", "header.csv has no row"),
    "list.jsonl": (b"[1]\n", "line 1 of .* holds a list, not an object"),
    "text.jsonl": (b'"x"\n', "line 1 of .* holds a str"),
    "null.jsonl": (b"null\n", "line 1 of .* holds a NoneType"),
    "half.jsonl": (b'{"text": "hi", "label": "a"}\n{"text": "a", "lab', "line 2 of .* is no JSON"),
    "deep.jsonl": (b"[" * 100_000, "line 1 of .* is no JSON"),
    "nan.jsonl": (b'{"text": "a", "label": NaN}\n', "line 1 of .* is no JSON .NaN is no number"),
    "infinite.jsonl": (b'{"text": "a", "label": -Infinity}\n', "line 1 of .* is no JSON"),
    "large.jsonl": (b'{"text": "a", "label": 1e999}\n', "line 1 of .*: 'label' is inf"),
    "lists.jsonl": (b'{"text": ["a"], "label": "b"}\n', r"line 1 of .*: 'text' is \['a'\]"),
    "dicts.jsonl": (b'{"text": "a", "label": {"b": 1}}\n', "line 1 of .*: 'label' is {'b': 1}"),
    "missing.jsonl": (b'{"text": "a"}\n', r"line 1 of .*: 'label' is None.*its columns are \['text'\]"),
    "blank.jsonl": (b'{"text": " ", "label": "b"}\n', "line 1 of .*: 'text' is ' '"),
    "latin.jsonl": (b'{"text": "\xff"}\n', "latin.jsonl is not UTF-8 text"),
    "array.json": (b'[{"text": "a", "label": "b"}, 3]', "row 2 of .* holds a int"),
    "half.json": (b'[{"text": "a"', "half.json is no JSON"),
    "notes.txt": (b"hi", "notes.txt is no table: give a file whose name ends in one of .csv"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        labelled_rows(tmp_path / name)


def test_rows_are_read_lazily(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\nno JSON\n')
    rows = table_rows(path)
    assert next(rows) == (f"line 1 of {path}", {"a": 1})
    with pytest.raises(ValueError, match="line 2"):
        next(rows)


@pytest.mark.parametrize(
    ("value", "name"),
    [(1, "1"), (1.0, "1"), (-0.0, "0"), (0.5, "0.5"), (True, "true"), ("False", "false"), (" a ", "a")],
)
def test_labels_have_one_name_wherever_they_come_from(tmp_path, value, name):
    assert label_of(value) == name
    rows = [{"text": f"{word} {i}", "label": label} for label, word in ((value, "x"), ("other", "y")) for i in range(4)]
    sizes = {"num_classes": 2, "num_support": 2, "num_queries": 2, "num_episodes": 1, "template": None}
    found = episodes_from_labels(rows, **sizes)[0]
    assert {row["label"] for row in found["support"]} == {name, "other"}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {row["label"] for row in labelled_rows(path)} == {name, "other"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "", "  ", [1], {"a": 1}, b"a"])
def test_labels_that_are_none_are_refused_by_builders_too(value):
    rows = [{"text": f"{i}", "label": value} for i in range(4)]
    with pytest.raises(ValueError, match="row 0: a label must be"):
        episodes_from_labels(rows, num_classes=1, num_support=1, num_queries=1, num_episodes=1)
