"""Tuned tiles: the files are whole, and the most specific entry wins."""

import pytest
import torch
from redknot_kernels.triton import cold, configurations


@pytest.mark.parametrize(("kernel", "names"), [("prefill", {"rows", "keys"}), ("decode", {"programs", "keys"})])
def test_every_configuration_names_a_tile(kernel, names):
    for entries in configurations.configurations(kernel).values():
        for entry in entries.values():
            assert entry.keys() == names | {"options"}
            assert entry["keys"] >= 16
            assert entry["options"].keys() >= {"num_warps", "num_stages"}


def test_the_most_specific_configuration_wins(monkeypatch):
    names = "default", "16bit d128", "paged 16bit d128", "paged 16bit d128 g4"
    entries = {"any": {name: name for name in names}, "sm90": {"16bit d64": "sm90 16bit d64"}}
    monkeypatch.setattr(configurations, "configurations", lambda kernel: entries)
    for arguments, name in (
        (("sm80", "local", 4, 128, 4), "default"),
        (("sm80", "local", 2, 96, 4), "16bit d128"),
        (("sm90", "paged", 2, 128, 2), "paged 16bit d128"),
        (("sm90", "paged", 2, 128, 4), "paged 16bit d128 g4"),
        (("sm90", "paged", 2, 64, 4), "sm90 16bit d64"),
    ):
        assert configurations.configuration("prefill", *arguments) == name


def test_rows_without_storage_are_one_kernel_for_any_number_of_queries():
    tile = configurations.configuration("decode", "sm90", "rows", 4, 16, 4)
    sizes = [cold.cold_sizes(None, tile, 16, 16, torch.device("cuda"), 4, 4 * tokens) for tokens in (1, 2, 3, 8)]
    assert sizes == sizes[:1] * 4
