from redknot_hf.reuse.assembly import Assembly
from redknot_hf.reuse.scattered import ScatteredPass


def test_nothing_stands_before_a_step():
    cache = ScatteredPass(layers=[])
    assert issubclass(Assembly, ScatteredPass)
    assert cache.get_seq_length() == cache.get_query_offset() == 0
    assert cache.get_mask_sizes(7, 0) == (7, 0)
    assert not cache.is_compileable
