"""Files that hold no object say so, whoever reads them."""

import re

import pytest

from redknot_hf.plan.json_file import error, read_json
from redknot_hf.plan.plan import HeadPlan
from redknot_hf.profiling import HeadProfile


def test_load_refuses_bytes_that_are_no_text(tmp_path):
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x93")
    with pytest.raises(ValueError, match=r"plan\.json: is not JSON"):
        HeadPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "load",
    [HeadPlan.load, HeadPlan.from_redknot, lambda path: HeadPlan.from_duo_attention(path, threshold=0.5)],
    ids=["load", "redknot", "duo"],
)
def test_missing_file_stays_a_missing_file(load, tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deeply_nested_files_are_told(tmp_path, opening):
    path = tmp_path / "plan.json"
    path.write_text(opening * 100_000)
    for read in (HeadPlan.load, HeadPlan.from_redknot, HeadProfile.load):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read(path)


@pytest.mark.parametrize(
    ("text", "problem"), [("[1, 2]", r"holds \[1, 2\], not an object"), ("{", "is not JSON")], ids=["list", "broken"]
)
def test_what_holds_no_object_is_told_with_the_fix(text, problem, tmp_path):
    path = tmp_path / "any.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"any\.json: {problem}.*; write it again"):
        read_json(path, "write it again")


def test_an_object_is_read_and_an_error_names_file_problem_and_fix(tmp_path):
    path = tmp_path / "any.json"
    path.write_text('{"a": "ä"}', encoding="utf-8")
    assert read_json(path, "write it again") == {"a": "ä"}
    assert str(error(path, "is empty", "fill it")) == f"{path}: is empty; fill it"
