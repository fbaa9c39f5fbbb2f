"""The default task leaks nothing, own tables are checked whole, and encoding is static."""

import json

import docstring_data
import numpy as np
import pytest
import table_data
import text_data
from docstring_data import Row


@pytest.fixture(scope="module")
def docstrings():
    return docstring_data.load(train_per_class=40, test_per_class=20)


def test_no_module_and_no_text_is_on_both_sides(docstrings):
    train, test = docstrings
    assert not {row.module for row in train} & {row.module for row in test}
    texts = [row.text.lower() for row in train + test]
    assert len(texts) == len(set(texts))


def test_several_classes_on_both_sides(docstrings):
    for rows in docstrings:
        assert len({row.label for row in rows}) >= 4


def test_names_of_the_packages_are_cut_out(docstrings):
    for rows in docstrings:
        for row in rows:
            assert not docstring_data._NAMES.search(row.text), row


def test_the_same_rows_every_time():
    first = docstring_data.load(train_per_class=5, test_per_class=5)
    assert first == docstring_data.load(train_per_class=5, test_per_class=5)


def test_near_copies_leave_the_test_rows():
    train = [Row("returns the sum of all the array elements over a given axis", "a", "a.x")]
    near = Row("Returns the sum of all the array elements over an axis.", "a", "a.y")
    far = Row("Draws a bar chart with one bar for each of the given heights.", "b", "b.y")
    assert docstring_data.without_near_copies([near, far], train) == [far]


def test_texts_that_two_packages_share_are_left_out():
    rows = [Row("Same", "a", "a.x"), Row("same", "b", "b.x"), Row("own", "a", "a.x")]
    assert docstring_data._deduplicate([*rows, rows[2]]) == [rows[2]]


def test_names_inside_words_and_any_case():
    assert docstring_data.clean("NumPy's numpyro np.add inputs, JAX jnp") == "'s .add inputs,"


def test_too_few_packages(monkeypatch):
    monkeypatch.setattr(docstring_data, "_folder", lambda label: None)
    with pytest.raises(ValueError, match=r"found none.*or pass --data FILE"):
        docstring_data.load()


def write(file, lines):
    file.write_text("\n".join(lines) + "\n")
    return file


def load(file):
    return table_data.load(file, text="body", label="folder")


def test_csv_and_jsonl_agree(tmp_path, table):
    train, test = load(table)
    records = [{"body": row.text, "folder": row.label} for row in train + test]
    file = write(tmp_path / "same.jsonl", [json.dumps(record) for record in records])
    again = load(file)
    assert {row.text for rows in again for row in rows} == {row.text for row in train + test}
    assert len(test) == 24
    assert not {row.text for row in train} & {row.text for row in test}
    assert {row.label for row in train} == {row.label for row in test} == {"red", "green", "blue"}


def test_split_is_the_same_every_time(table):
    assert load(table) == load(table)


def test_repeated_texts_are_kept_once(tmp_path):
    lines = ["body,folder", "one,a", "one,a", "two,a", "three,b", "four,b"]
    train, test = load(write(tmp_path / "t.csv", lines))
    assert sorted(row.text for row in train + test) == ["four", "one", "three", "two"]


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("t.csv", ["text,folder", "x,a"], r"no column 'body' \(--text\).*: text, folder"),
        ("t.csv", ["body,kind", "x,a"], r"no column 'folder' \(--label\).*: body, kind"),
        ("t.csv", ["body,folder", "x,a", "y,a"], r"'folder' has one class only \('a'\)"),
        ("t.csv", ["body,folder", "x,a", ",b", "z, "], r"2 rows with an empty.*lines 3, 4"),
        ("t.csv", ["body,folder", "x,a", "y,a", "z,b"], r"b in column 'folder' have one row"),
        ("t.csv", ["body,folder", "x,a", "x,b"], r"lines 2 and 3 have the same text with two"),
        ("t.csv", ["body,folder"], "no rows"),
        ("t.jsonl", ['{"body": "x", "folder": "a"}', "oops"], "line 2: not JSON"),
        ("t.jsonl", ['["x", "a"]'], "line 1: expected one JSON object a line.*got list"),
        ("t.jsonl", ['{"body": "x"}', '{"folder": "a"}'], "2 rows with an empty.*lines 1, 2"),
        ("t.xlsx", ["body,folder"], r"ends in '\.xlsx'; use \.csv or \.jsonl"),
    ],
)
def test_bad_tables(tmp_path, name, lines, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / name, lines))


def test_no_such_table(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "none.csv")


def test_encoding_is_cut_and_padded_to_one_length(tiny_bert):
    texts = ["a red cat", "the " * 50, ""]
    tokens, mask = text_data.encode(texts, tiny_bert / "tokenizer.json", 6)
    assert tokens.dtype == mask.dtype == np.int32
    assert tokens.tolist()[0] == [2, 12, 4, 7, 3, 0]
    assert tokens.tolist()[1] == [2, 13, 13, 13, 13, 3]
    assert mask.sum(axis=1).tolist() == [5, 6, 2]


def test_fingerprint_sees_every_number(tiny_bert):
    rows = [Row("a cat", "x", ""), Row("a dog", "y", "")]
    split = text_data.encode_rows(rows, ("x", "y"), tiny_bert / "tokenizer.json", 6)
    assert split.labels.tolist() == [0, 1]
    other = split._replace(labels=split.labels[::-1])
    assert text_data.fingerprint(split) != text_data.fingerprint(other)
    assert text_data.fingerprint(split) == text_data.fingerprint(split)
