"""Tables: rows of CSV and JSON files, read in one way wherever a file is named.

Every row comes with its place, such as "row 3 of tickets.csv", which messages name.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd

Row = dict[str, Any]
SEPARATORS = {".csv": ",", ".tsv": "\t"}
JSON_LINES, JSON = (".jsonl", ".ndjson"), ".json"
TABLES = (*SEPARATORS, *JSON_LINES, JSON)
ROWS_AT_ONCE = 1000
WHOLE = re.compile(r"-?\d+(\.0+)?")


def is_table(path: Path) -> bool:
    """Whether the end of a file's name is that of a table: .csv, .tsv, .jsonl, .ndjson or .json, in any case."""
    return path.suffix.lower() in TABLES


def table_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the place and the values of every row, lazily.

    | file               | a row is                                     | values                    |
    |--------------------|----------------------------------------------|---------------------------|
    | `.csv`, `.tsv`     | a line below the header, or several, quoted  | text; None where empty    |
    | `.jsonl`,`.ndjson` | a line that is not empty: a JSON object      | as in JSON                |
    | `.json`            | an object in an array; or as `.jsonl`        | as in JSON                |

    A byte-order mark, as Excel writes it, is no part of the text. Names of columns lose white space at their ends.

    Args:
        path: the file.

    Raises:
        ValueError: if the file is not UTF-8 text, a row has more fields than the header or is no JSON object, a number
            is NaN or infinite, a name of a column occurs twice, or the end of the name is of no table.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.csv")
        ...     _ = path.write_text('text,label\\n"hello, world",greeting\\n')
        ...     [row for _, row in table_rows(path)]
        [{'text': 'hello, world', 'label': 'greeting'}]
    """
    if not is_table(path):
        raise ValueError(f"{path} is no table: give a file whose name ends in one of {', '.join(TABLES)}")
    if path.suffix.lower() in SEPARATORS:
        return _csv_rows(path, SEPARATORS[path.suffix.lower()])
    return _json_rows(path)


def labelled_rows(path: Path, text: str = "text", label: str = "label") -> list[dict[str, str]]:
    """Read `{"text", "label"}` from every row of a table.

    Args:
        path: the file, see `table_rows`.
        text, label: names of the two columns. Labels are written as `label_of` writes them. If all labels are whole
            numbers, such as "1.0" and "2", they lose their ".0".

    Raises:
        ValueError: if a row lacks one of them, or the file has no row.
    """
    rows = []
    for place, row in table_rows(path):
        found = {"text": row.get(text), "label": row.get(label)}
        for name, value in zip((text, label), found.values(), strict=True):
            if not _is_value(value):
                raise ValueError(
                    f"{place}: {name!r} is {value!r:.80}, expected a text, a number or true or false; its columns are "
                    f"{sorted(row)}"
                )
        rows.append({"text": label_of(found["text"], strip=False), "label": label_of(found["label"])})
    if not rows:
        raise ValueError(f"{path} has no row")
    if all(WHOLE.fullmatch(row["label"]) for row in rows):
        rows = [row | {"label": plain_number(row["label"])} for row in rows]
    return rows


def plain_number(label: str) -> str:
    """A whole number without its ".0"; any other label as it is."""
    return label.partition(".")[0] if WHOLE.fullmatch(label) else label


def label_of(value: str | bool | int | float, *, strip: bool = True) -> str:
    """The name of a label: 1.0 is "1", True and "True" are "true", and white space at the ends is left out.

    Args:
        value: a text, a number or a truth value.
        strip: False keeps white space, and "True" as it is.

    Raises:
        ValueError: if it is none of them, NaN, infinite, or empty.

    Example:
        >>> [label_of(x) for x in (1.0, 0.5, True, "TRUE", " fee ")]
        ['1', '0.5', 'true', 'true', 'fee']
    """
    if not _is_value(value):
        raise ValueError(f"a label must be a text, a number or a truth value, got {value!r:.80}")
    if isinstance(value, str):
        text = value.strip() if strip else value
        return text.lower() if strip and text in ("True", "False", "TRUE", "FALSE") else text
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def text_of(path: Path) -> str:
    """The text of a file, without a byte-order mark.

    Raises:
        ValueError: if the file is not UTF-8 text.
    """
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it first") from error


def _is_value(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))


# ---------------------------------------------------------------- CSV


def _csv_rows(path: Path, separator: str) -> Iterator[tuple[str, Row]]:
    names, number = None, 0
    for values in _csv_values(path, separator):
        if names is None:
            names = _column_names(values, path)
            continue
        number += 1
        yield f"row {number} of {path}", dict(zip(names, values, strict=True))


def _csv_values(path: Path, separator: str) -> Iterator[list[str | None]]:
    """The fields of every line, that of the header too; None for one that is empty or missing."""
    # The header is read as a row like any other: then a row that is longer is an error for pandas, not an index.
    try:
        tables = pd.read_csv(
            path,
            sep=separator,
            header=None,
            dtype=str,
            keep_default_na=False,
            na_values=[""],
            encoding="utf-8-sig",
            chunksize=ROWS_AT_ONCE,
        )
        with tables:
            for table in tables:
                for values in table.to_numpy(dtype=object).tolist():
                    yield [None if pd.isna(value) else value for value in values]
    except pd.errors.EmptyDataError:
        return
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as CSV UTF-8") from error
    except pd.errors.ParserError as error:
        raise ValueError(_csv_error(path, str(error))) from error


def _csv_error(path: Path, found: str) -> str:
    if counts := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", found):
        expected, line, saw = map(int, counts.groups())
        return (
            f"row {line - 1} of {path} has {saw} fields, the header {expected}: put quotation marks around a text with "
            "a separator in it"
        )
    return f"{path} is no table ({' '.join(found.split())}): close every quotation mark"


def _column_names(values: list[str | None], path: Path) -> list[str]:
    names = ["" if value is None else value.strip() for value in values]
    if twice := {name for name in names if name and names.count(name) > 1}:
        raise ValueError(f"{path} has the column {min(twice)!r} more than once: give its columns different names")
    return names


# ---------------------------------------------------------------- JSON


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    if path.suffix.lower() == JSON and (text := text_of(path)).lstrip().startswith("["):
        for number, row in enumerate(_json(text, str(path)), 1):
            yield f"row {number} of {path}", _object(row, f"row {number} of {path}")
        return
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    place = f"line {number} of {path}"
                    yield place, _object(_json(line, place), place)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it first") from error


def _json(text: str, place: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is no JSON ({error}): write one object per line") from error


def _object(found: Any, place: str) -> Row:
    if not isinstance(found, dict):
        raise ValueError(f'{place} holds a {type(found).__name__}, not an object such as {{"text": ...}}')
    return {name.strip(): value for name, value in found.items()}
