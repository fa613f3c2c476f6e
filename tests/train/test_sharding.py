"""train.sharding: mesh sizes, rules by parameter names, and agreement between device counts."""

import dataclasses
import io
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from rich.console import Console

from configs.tiny import config as tiny
from models.transformer import abstract
from sparse_attn import NSA
from train.config import MeshConfig, UserError
from train.loop import plan
from train.reporting import print_placement
from train.sharding import (
    AXES,
    RULES,
    abstract_with,
    check_divisible,
    describe_placement,
    make_mesh,
    tree_shardings,
)

ROOT = Path(__file__).parents[2]


def abstract_mesh(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return AbstractMesh(shape, AXES, (AxisType.Auto,) * len(AXES))


def test_one_device_has_every_axis():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (
            MeshConfig(data=2, fsdp=1, sequence=1, tensor=3),
            8,
            r"data=2 \* fsdp=1 \* sequence=1 \* tensor=3 = 6 devices, but there are 8",
        ),
        (MeshConfig(data=-1, tensor=3), 8, "multiply to 3, which does not divide 8 devices"),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices(config, devices, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config, jax.devices()[:1] * devices)


def test_the_command_line_sees_a_mistake_of_the_caller():
    with pytest.raises(UserError, match="tensor=7"):
        plan(dataclasses.replace(tiny, mesh=MeshConfig(tensor=7)))


def test_batches_that_cannot_be_split():
    mesh = abstract_mesh(data=2, fsdp=2, sequence=4)
    check_divisible(mesh, batch_size=8, microbatches=2, sequence_length=64)
    with pytest.raises(ValueError, match=r"batch_size=12 / microbatches=2 = 6 rows .* 4"):
        check_divisible(mesh, batch_size=12, microbatches=2, sequence_length=64)
    with pytest.raises(ValueError, match=r"sequence_length=66 .*mesh.sequence=4"):
        check_divisible(mesh, batch_size=8, microbatches=1, sequence_length=66)


def test_rules_place_parameters_by_name():
    model = dataclasses.replace(tiny.model, vocab_size=260, kv_heads=2, tie_embeddings=False)
    params = abstract(model)[1]
    mesh = abstract_mesh(fsdp=2, tensor=2)
    placed = tree_shardings(params, mesh)
    attention = placed["layers"]["0-1"]["attention"]
    assert placed["embedding"].spec == PartitionSpec("tensor", "fsdp")
    assert attention["q"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    # Stacked layers and kv branches come before the placed axes.
    assert attention["k"].spec == PartitionSpec(None, None, "fsdp", "tensor", None)
    assert attention["o"].spec == PartitionSpec(None, "tensor", None, "fsdp")
    assert placed["final_norm"]["scale"].spec == PartitionSpec(None)


def test_maps_of_mechanisms_are_split_where_they_divide():
    model = dataclasses.replace(tiny.model, attention=NSA(), kv_heads=2)
    params = abstract(model)[1]
    for size, axes in ((2, "fsdp"), (3, None)):
        placed = tree_shardings(
            params["layers"]["0-1"]["attention"], abstract_mesh(fsdp=size), RULES[-2:]
        )["mechanism"]
        assert placed["compress_k"]["w_in"].spec == PartitionSpec(*(None,) * 4, axes)
        assert placed["compress_k"]["b_in"].spec == PartitionSpec(*(None,) * 3)
    split = abstract_mesh(fsdp=2, sequence=4)
    place = tree_shardings(params, split)["layers"]["0-1"]["attention"]["mechanism"]
    assert place["compress_v"]["w_in"].spec[-1] == ("fsdp", "sequence")


def test_what_went_where_is_told_once_for_all_layers():
    model = dataclasses.replace(tiny.model, vocab_size=260, kv_heads=2, scan_layers=False)
    params, mesh = abstract(model)[1], abstract_mesh(fsdp=2, tensor=2)
    params = abstract_with(tree_shardings(params, mesh), params)
    placed = {group.name: group for group in describe_placement(params)}
    up = placed["layers/*/mlp/up"]
    assert (up.count, up.shape, up.axes) == (2, (16, 32), ("fsdp", "tensor"))
    assert up.bytes_per_device == 2 * 16 * 32 * 4 / 4
    norm = placed["final_norm/scale"]
    assert (norm.axes, norm.bytes_per_device) == ((None,), 16 * 4)
    sizes = [group.bytes_per_device for group in describe_placement(params)]
    assert sizes == sorted(sizes, reverse=True)

    console = Console(file=io.StringIO(), width=120)
    print_placement(console, params)
    row = next(line for line in console.file.getvalue().splitlines() if "mlp/up" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        *("layers/*/mlp/up", "2", "[16, 32]", "(fsdp, tensor)", "0.00")
    ]


def test_the_first_matching_rule_wins_and_one_must_match():
    tree = {"mlp": {"up": jax.ShapeDtypeStruct((4, 4), "f4")}}
    rules = ((r"up$", ("tensor",)), (r"mlp", ("fsdp",)))
    assert tree_shardings(tree, abstract_mesh(), rules)["mlp"]["up"].spec == PartitionSpec(
        None, "tensor"
    )
    with pytest.raises(ValueError, match="no sharding rule matches 'mlp/up'"):
        tree_shardings(tree, abstract_mesh(), rules[:0])


def test_an_axis_that_cannot_be_split_is_named():
    with pytest.raises(ValueError, match=r"embedding .*axis of 259 .*mesh.tensor=2"):
        tree_shardings(abstract(tiny.model)[1], abstract_mesh(tensor=2))
