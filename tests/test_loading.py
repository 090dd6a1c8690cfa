"""What a command is to load, and what it says of what is no model."""

import re

import pytest

from redknot_cli.loading import Source


@pytest.mark.parametrize(
    ("name", "gguf", "told"),
    [
        ("m/q8.gguf", None, "is a file: give its folder, m, and --gguf-file q8.gguf"),
        ("m", None, "m has no config.json: give --gguf-file q8.gguf"),
        ("m", "q4.gguf", "m has no file q4.gguf; in this format it has q8.gguf"),
        ("empty", None, "empty has no config.json: save_pretrained"),
        ("models/of/mine", None, "there is no folder models/of/mine; a model on the Hub is ORG/NAME"),
        ("./mine", None, "there is no folder mine"),
    ],
)
def test_a_folder_of_no_model_is_told_before_anything_is_loaded(name, gguf, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("redknot_cli.loading.find_spec", lambda name: True)
    for folder in ("m", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "m" / "q8.gguf").touch()
    with pytest.raises(ValueError, match=re.escape(told)):
        Source(name, gguf=gguf, device="cpu")
