"""impl's initialisation where the properties do not reach: names and orders."""

from typing import Any

import pytest
import torch
from torch.nn import ModuleDict

from impl.groups import build_groups
from impl.initialise import initialise_whole, transformer_rule
from impl.linear import ColumnParallelLinear, RowParallelLinear
from impl.parameters import defer
from verify.cluster import open_cluster
from verify.layout import Layout


@pytest.fixture(scope="module")
def cluster():
    with open_cluster("sim", world_size=4) as opened:
        yield opened


def _initialised(layout, order):
    """A parameter's values by name, where modules hold them in another order."""
    groups = build_groups(layout)
    common: dict[str, Any] = {"group": groups.tp, "init": defer, "sequence_parallel": False}
    column = ColumnParallelLinear(6, out_features=12, **common)
    row = RowParallelLinear(12, out_features=6, **common)
    assert column.weight.isnan().all()
    layers = {"column": column, "row": row}
    module = ModuleDict({name: layers[name] for name in order})
    rule = transformer_rule(1.0, num_layers=2)
    initialise_whole(module, seed=3, rule=rule, groups=groups, name_of="stage.{}".format)
    groups.destroy()
    return {name: value.detach() for name, value in module.named_parameters()}


def test_a_parameter_depends_on_its_name_and_on_nothing_else(cluster):
    """Neither on the order in which a module holds them, nor on the group."""
    (alone,) = cluster.run(_initialised, Layout(), ("row", "column"), world_size=1)
    found = cluster.run(_initialised, Layout(tp=2), ("column", "row"), world_size=2)
    for name, dim in (("column.weight", 0), ("row.weight", 1)):
        assert torch.equal(torch.cat([each[name] for each in found], dim), alone[name])
    assert not alone["row.bias"].any()


def _rows(sizes):
    """Initial weights of layers that differ in their number of rows only."""
    groups = build_groups(Layout())
    found = []
    for rows in sizes:
        layer = ColumnParallelLinear(
            12, out_features=rows, group=groups.tp, init=defer, sequence_parallel=False
        )
        rule = transformer_rule(1.0, num_layers=2)
        initialise_whole(layer, seed=3, rule=rule, groups=groups)
        found.append(layer.weight.detach())
    groups.destroy()
    return found


def test_rows_of_padding_change_no_other_row(cluster):
    """There are as many as tp needs, so that the rows of an embedding depend on the layout."""
    (found,) = cluster.run(_rows, (1, 2, 257, 258, 260), world_size=1)
    assert all(torch.equal(each[:257], found[-1][: len(each[:257])]) for each in found)
    assert found[-1].std() > 0.5
