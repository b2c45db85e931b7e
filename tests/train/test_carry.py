"""What a network takes over from another one: interpolated tables, label tables, moments."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gae_jax.train import carry
from gae_jax.train.carry import Classes, carried, labels_line, make_plan, resized
from gae_jax.train.state import TrainState


def cubic(distance):
    """Keys' kernel with a = -0.75, written out."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def bicubic(grid, size):
    """[G, G, C] -> [size, size, C], point by point, pixels' centres at i + 1/2, edges repeated."""
    side = len(grid)
    found = np.zeros((size, size, grid.shape[-1]))
    for row in range(size):
        for column in range(size):
            at = [(i + 0.5) * side / size - 0.5 for i in (row, column)]
            first = [math.floor(x) - 1 for x in at]
            for i in range(first[0], first[0] + 4):
                for j in range(first[1], first[1] + 4):
                    weight = cubic(at[0] - i) * cubic(at[1] - j)
                    inside = np.clip([i, j], 0, side - 1)
                    found[row, column] += weight * grid[inside[0], inside[1]]
    return found


@pytest.mark.parametrize(("side", "size"), [(4, 8), (6, 4), (3, 5)])
@pytest.mark.parametrize("leading", [0, 1])
def test_learned_positions_are_interpolated_bicubically_and_that_of_cls_stays(side, size, leading):
    table = np.random.default_rng(side).normal(size=(1, leading + side**2, 3)).astype(np.float32)
    found = resized(table, leading + size**2)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[:, :leading], table[:, :leading])
    wanted = bicubic(table[0, leading:].reshape(side, side, 3), size)
    np.testing.assert_allclose(found[0, leading:].reshape(size, size, 3), wanted, atol=2e-6)


HERE = {
    "blocks/0/kernel": (4, 4),
    "pos_embed": (1, 64, 4),
    "decoder/pos_embed": (1, 17, 4),
    "blocks/0/lora/a": (4, 2),
    "latent_mean": (8,),
}
THERE = {
    "blocks/0/kernel": (4, 4),
    "pos_embed": (1, 16, 4),
    "decoder/pos_embed": (1, 5, 4),
    "latent_mean": (3, 3, 8),
}


def test_every_array_is_taken_interpolated_or_new_with_a_reason():
    plan = make_plan(HERE, THERE, computed=lambda path: path.startswith("decoder/"))
    assert plan.problems == ()
    assert plan.taken == ("blocks/0/kernel",)
    assert plan.resized == {"pos_embed": ((1, 16, 4), (1, 64, 4))}
    assert set(plan.new) == {"decoder/pos_embed", "blocks/0/lora/a", "latent_mean"}
    assert set(plan.left) == {"latent_mean"}


@pytest.mark.parametrize(
    ("here", "there", "problem"),
    [
        ({"a": (2, 3)}, {"a": (2, 4)}, "a: [2, 3] here, [2, 4] in the source"),
        ({"a": (2,), "b": (1,)}, {"a": (2,)}, "b: [1] here, absent in the source"),
        ({"a": (2,)}, {"a": (2,), "b": (1,)}, "b: absent here, [1] in the source"),
        # another width, no square, and CLS on one side only
        ({"pos_embed": (1, 64, 4)}, {"pos_embed": (1, 16, 8)}, "[1, 64, 4] here, [1, 16, 8]"),
        ({"pos_embed": (1, 60, 4)}, {"pos_embed": (1, 16, 4)}, "[1, 60, 4] here, [1, 16, 4]"),
        ({"pos_embed": (1, 17, 4)}, {"pos_embed": (1, 16, 4)}, "[1, 17, 4] here, [1, 16, 4]"),
    ],
)
def test_what_does_not_fit_is_named_with_both_shapes(here, there, problem):
    found = make_plan(here, there, computed=lambda path: False).problems
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.parametrize(
    ("there", "here", "kept", "words"),
    [
        # (row here -> row of the source)
        (Classes(3, True), Classes(5, True), {5: 3}, "new, 5 classes, 3 in the source; the row of"),
        (Classes(3, True), Classes(2, False), {}, "row of no class is left"),
        (Classes(3, False), Classes(2, True), {}, "row of no class is new"),
        # one row more or less, and yet the same classes; then as many rows, and yet others
        (
            Classes(3, False),
            Classes(3, True),
            {0: 0, 1: 1, 2: 2},
            "rows of the 3 classes are taken",
        ),
        (Classes(3, True), Classes(4, False), {}, "new, 4 classes, 3 in the source"),
    ],
)
def test_rows_of_classes_are_taken_only_for_as_many_classes(there, here, kept, words):
    path = f"dit/{carry.LABELS}"
    rows = {
        side: classes.count + classes.null
        for side, classes in zip("ab", (there, here), strict=True)
    }
    source = np.arange(rows["a"] * 2, dtype=np.float32).reshape(-1, 2)
    fresh = -1 - np.arange(rows["b"] * 2, dtype=np.float32).reshape(-1, 2)
    plan = make_plan(
        {path: fresh.shape}, {path: source.shape}, computed=lambda _: False, classes=(there, here)
    )
    found = carried(plan, {path: source}, lambda _: fresh)[path]
    for row in range(rows["b"]):
        np.testing.assert_array_equal(found[row], source[kept[row]] if row in kept else fresh[row])
    assert words in labels_line(there, here)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_moments_are_taken_where_they_fit_and_the_schedule_starts_anew(clip):
    rate = optax.linear_schedule(1.0, 0.0, 10)
    optimizer = optax.adamw(rate)
    if clip:
        optimizer = optax.chain(optax.clip_by_global_norm(clip), optimizer)
    params = {"a": jnp.ones((2, 2)), "b": {"c": jnp.ones(3)}}
    moments = {
        "mu": {"a": np.full((2, 2), 2.0), "b": {"c": np.full(3, 3.0)}},
        "nu": {"a": np.full((2, 2), 4.0), "b": {"c": np.full(3, 5.0)}},
        "count": np.int32(7),
    }
    state = TrainState(jnp.int32(0), {"n": params}, {"n": {}}, {"n": optimizer.init(params)}, {})
    found = carry.with_moments(state, "n", moments, ("b/c",)).opt["n"]
    adam = next(
        part for part in jax.tree.leaves(found, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(part, "mu")
    )  # fmt: skip
    assert int(adam.count) == 7
    np.testing.assert_array_equal(adam.mu["b"]["c"], 3.0)
    np.testing.assert_array_equal(adam.nu["b"]["c"], 5.0)
    np.testing.assert_array_equal(adam.mu["a"], 0.0)
    counts = optax.tree.get_all_with_path(found, "count")
    assert sorted(int(count) for _, count in counts) == [0, 7]
