"""What a step hands on: tables of seats, what a scheduler asks of pages, and tokens on their way to requests."""

import numpy as np
import torch
from families import make_model
from served import SIZES, plan_of

from redknot_hf.serving import Engine, Sampling
from redknot_hf.serving.chosen import on_its_way, told
from redknot_hf.serving.paging import Memory
from redknot_hf.serving.request import Token
from redknot_hf.serving.tables import Tables


def test_tables_of_a_seat_are_those_of_its_rows():
    model = make_model("llama")
    engine = Engine(model, plan_of(model).stored("int8"), **SIZES)
    assert isinstance(engine.memory, Memory)
    engine.submit(list(range(3, 90)), Sampling(max_new_tokens=9))
    while not engine.scheduler.running:
        engine.step()
    (sequence,) = engine.scheduler.running
    home = torch.device("cpu")
    layers = {i: layer.storage for i, layer in enumerate(sequence.held.layers)}
    tables = Tables({home: layers}, 2, 16)
    tables.put(sequence, 1)
    hot, cold = tables.of(home, tables.flat[home])
    assert len(hot) == len(layers)
    assert cold
    assert all(bool(view[1].any()) for view in hot.values())
    for i, storage in layers.items():
        table = storage.rows.table[0]
        width = min(table.shape[1], hot[i].shape[-1])
        assert np.array_equal(hot[i][1, :, :width], np.maximum(table[:, :width], 0))
    assert not any(bool(view[0].any()) for views in (hot, cold) for view in views.values()), "the other seat is empty"


def test_tokens_are_told_with_the_likeliest_where_that_was_asked():
    chosen = on_its_way([], torch.tensor([7, 8]), {})
    assert chosen.come
    assert told(7, None) is told(7, None)
    likely = (torch.tensor([-0.5]), torch.tensor([[-0.5, -1.0]]), torch.tensor([[7, 9]]))
    assert told(7, likely) == Token(7, -0.5, ((7, -0.5), (9, -1.0)))
