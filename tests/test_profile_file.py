"""A profile's file: what is written is read, version 1 too, and what is damaged is told before it is used."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from redknot_hf.plan.spec import HeadSpec
from redknot_hf.profiling import profile_file

ARGUMENTS = {
    "method": "drift", "heads_by_layer": (2, 1), "choices": (HeadSpec(4, 1), HeadSpec(storage="int8")),
    "errors": np.array([[0.125, 0.5], [0.25, 0.5], [1.0, 2.0]]), "length": 100, "head_dims": ((8, 8), (16, 8)),
    "itemsize": 2, "target": {"budget": 0.3}, "searched": (0, 2, 1), "provenance": {"model": "tiny"},
    "sources": None,
}  # fmt: skip
PROFILE = SimpleNamespace(**ARGUMENTS, halves=(ARGUMENTS["errors"], 2 * ARGUMENTS["errors"]))


@pytest.fixture
def path(tmp_path):
    profile_file.write(tmp_path / "profile.json", PROFILE)
    return tmp_path / "profile.json"


def same(found, expected):
    if isinstance(expected, tuple) and isinstance(expected[0], np.ndarray):
        return len(found) == len(expected) and all(map(np.array_equal, found, expected))
    return np.array_equal(found, expected) if isinstance(expected, np.ndarray) else found == expected


def test_what_is_written_is_read(path):
    found = profile_file.read(path, SimpleNamespace)
    assert vars(found).keys() == vars(PROFILE).keys()
    assert all(same(getattr(found, name), expected) for name, expected in vars(PROFILE).items())


def test_layers_that_share_keys_are_told(path):
    sharing = {"heads_by_layer": (2, 1, 2), "head_dims": ((8, 8),) * 3, "sources": (0, 1, 0)}
    profile_file.write(path, SimpleNamespace(**{**vars(PROFILE), **sharing}))
    assert profile_file.read(path, SimpleNamespace).sources == (0, 1, 0)


def test_the_same_profile_gives_the_same_bytes(path):
    before = path.read_bytes()
    profile_file.write(path, profile_file.read(path, SimpleNamespace))
    assert path.read_bytes() == before


def test_version_1_knew_windows_and_a_tokens_bytes(path):
    data = json.loads(path.read_text())
    for key in ("choices", "head_dims", "itemsize", "searched"):
        del data[key]
    path.write_text(json.dumps(data | {"version": 1, "windows": [4, 16], "sink": 2, "token_bytes": 48}))
    found = profile_file.read(path, SimpleNamespace)
    assert found.choices == (HeadSpec(4, 2), HeadSpec(16, 2))
    assert (found.head_dims, found.itemsize, found.searched) == (((48, 0), (48, 0)), 1, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, r"has format \('redknot-profile', 3\)"),
        ({"version": True}, "has format"),
        ({"format": "redknot-plan"}, "has format"),
        ({"length": -1}, "is damaged .*length is -1"),
        ({"itemsize": 2.0}, r"is damaged .*itemsize is 2\.0"),
        ({"errors": [[1, float("nan")]]}, "is damaged .*nan is no finite number"),
        ({"errors": [1, 2]}, "is damaged .*errors is 1, no list"),
        ({"searched": [0, 1]}, "is damaged .*searched names 2 heads of 3"),
        ({"searched": [0, 1, 3]}, "is damaged .*searched is 3"),
        ({"sources": [0, 2]}, "is damaged .*sources is 2"),
        ({"sources": [0, 0]}, "is damaged .*share the keys of one with as many heads"),
        ({"choices": [{"window": 0}]}, "is damaged .*window is 0"),
        ({"target": []}, r"is damaged .*target is \[\], no mapping"),
        ({"heads_by_layer": [2**31]}, "is damaged .*heads_by_layer is 2147483648"),
    ],
    ids=str,
)
def test_what_is_damaged_is_told(path, change, message):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"profile\.json: {message}"):
        profile_file.read(path, SimpleNamespace)


def test_errors_that_json_cannot_hold_are_not_written(path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        profile_file.write(path, SimpleNamespace(**{**vars(PROFILE), "errors": np.array([[np.inf]])}))
    assert profile_file.read(path, SimpleNamespace).length == 100
