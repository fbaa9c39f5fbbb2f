"""What the manifest says of an adapter, by the fields that `Adapter` declares."""

from __future__ import annotations

import dataclasses
import json
from typing import Literal

import pytest
from helpers import message

import lojax
from lojax.adapters.adapter import ARRAYS
from lojax.checkpoint.manifest import (
    STATIC_FIELDS,
    BaseEntry,
    Manifest,
    StoredArray,
    StoredFile,
    adapter_from_json,
    adapter_to_json,
    parse,
    stored_name,
    to_plain,
)


def test_the_fields_are_those_of_the_adapter():
    assert {*STATIC_FIELDS, *ARRAYS, "entries"} == {field.name for field in dataclasses.fields(lojax.Adapter)}
    assert {"a", "b", "magnitude", "rows"} <= {*ARRAYS} and {"scale", "axes"} <= {*STATIC_FIELDS}


@pytest.mark.parametrize(
    ("hint", "value", "parsed"),
    [
        (float, 2, 2.0),
        (float | tuple[float, ...], [1, 2.5], (1.0, 2.5)),
        (float | tuple[float, ...], 3, 3.0),
        (tuple[int, ...] | None, None, None),
        (tuple[int, ...] | None, [1, 2], (1, 2)),
        (bool, True, True),
        (str | None, "pissa", "pissa"),
        (tuple[Literal["in", "out"], ...], ["in", "out"], ("in", "out")),
    ],
)
def test_parse(hint, value, parsed):
    result = parse(hint, value, "field")
    assert result == parsed and type(result) is type(parsed)


@pytest.mark.parametrize(
    ("hint", "value", "kind"),
    [
        (float, "2", TypeError),
        (float, True, TypeError),
        (float, float("inf"), ValueError),
        (float, 10**400, OverflowError),
        (bool, 1, TypeError),
        (int, True, TypeError),
        (tuple[int, ...] | None, [1.5], TypeError),
        (float | tuple[float, ...], {}, TypeError),
        (Literal["in", "out"], "up", ValueError),
        (Literal["in", "out"], [], TypeError),
    ],
)
def test_parse_refuses(hint, value, kind):
    with pytest.raises(kind):
        parse(hint, value, "field")


def test_a_stored_array_knows_its_size_and_goes_through_json():
    array = StoredArray((3, 4), "bfloat16", {"kind": "Partitioned", "names": ["x", None]})
    assert array.bytes == 24 and parse(StoredArray, to_plain(array), "w") == array
    for box in ("Partitioned", {"kind": 3}, {"kind": "Partitioned", "names": "xy"}):
        with pytest.raises((TypeError, ValueError), match="box"):
            parse(StoredArray, {**to_plain(array), "box": box}, "w")


def _adapter(**fields):
    arrays = {"a": StoredArray((5, 3), "float32"), "b": StoredArray((3, 7), "float32")}
    return lojax.Adapter(**{**arrays, "scale": 2.0, "axes": ("in", "out"), **fields})


def test_an_adapter_goes_through_json_with_rank_alpha_and_weight_for_readers():
    fields = adapter_to_json(_adapter())
    assert list(fields)[:3] == ["rank", "alpha", "scaling"] and (fields["rank"], fields["alpha"]) == (3, 6.0)
    assert fields["weight"] == [5, 7] and "frozen_a" not in fields  # what has its default is left out
    assert adapter_from_json(fields, "w") == _adapter()
    rows = _adapter(a=None, b=None, tokens=(0, 4), rows=StoredArray((2, 7), "float32"))
    assert adapter_to_json(rows)["weight"] == [None, 7]  # nothing stored has the length of the vocabulary
    assert adapter_from_json(adapter_to_json(rows), "w") == rows


@pytest.mark.parametrize(
    "change", [{"rank": 4}, {"weight": [5, 8]}, {"b": None}, {"tokens": [1]}, {"scale": None}, {"axes": ["in", "in"]}]
)
def test_an_adapter_whose_entry_contradicts_itself_is_refused(change):
    with pytest.raises((ValueError, TypeError, KeyError)):
        adapter_from_json({**adapter_to_json(_adapter()), **change}, "w")


def test_a_manifest_goes_through_json_and_names_its_arrays(tmp_path):
    manifest = Manifest(
        metadata={"step": 1},
        adapters={"w": _adapter()},
        full={"head": StoredArray((2,), "int8")},
        other=("rest",),
        keys={"rest": ("rest", 0)},
        base={"w": BaseEntry("float32[5,7]", "0" * 16), "head": None, "rest": BaseEntry("int8[1]")},
        arrays="arrays-3",
        files={"d/x": StoredFile(3, "00")},
    )
    fields = json.loads(json.dumps(manifest.to_json()))
    assert Manifest.from_json(fields, tmp_path) == manifest
    assert manifest.paths == ("w", "head", "rest") and list(manifest.stored) == ["w/a", "w/b", "head"]
    text = message(ValueError, Manifest.from_json, {**fields, "base": {"other": None}}, tmp_path)
    assert "'other', which is not a path of the adapter" in text and str(tmp_path) in text


def test_stored_names_stay_apart():
    names = ["a/b", "a", "a/.", "a/..", "a/%2E", "", "/", "a//b", "A b", "A%20b", "é", "\0", "a\\b"]
    assert len({stored_name(name, None) for name in names}) == len(names)
    assert not any(".." in stored_name(name, None).split("/") for name in names)
