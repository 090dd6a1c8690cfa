import numpy as np

from redknot_hf import HeadSpec
from redknot_hf.profiling.choices import falling, name_of

CHOICES = [HeadSpec(4, 1), HeadSpec(16, 1), HeadSpec(storage="int4"), HeadSpec(storage="int8")]


def test_choices_have_names():
    assert [*map(name_of, [*CHOICES, HeadSpec()])] == ["window 4", "window 16", "int4", "int8", "everything"]


def test_who_keeps_more_errs_no_more_and_windows_are_not_held_against_bits():
    found = falling(np.array([[1.0, 2.0, 0.5, 0.75], [2.0, 1.0, 3.0, 0.5]]), CHOICES)
    assert found.tolist() == [[2.0, 2.0, 0.75, 0.75], [2.0, 1.0, 3.0, 0.5]]
