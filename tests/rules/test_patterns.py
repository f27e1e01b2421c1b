import keras
import numpy as np
import pytest

import keras_renorm as kr
from keras_renorm.src.kernels.masks import compute_mask
from keras_renorm.src.rules import patterns


def test_block_by_hand():
    scores = np.array([[1.0, 1.0], [1.0, 9.0], [5.0, 1.0], [5.0, 1.0]])
    # Blocks of 2 inputs x 1 unit score 2, 10 and 10, 2.
    expected = [[False, True], [False, True], [True, False], [True, False]]
    np.testing.assert_array_equal(compute_mask(scores, 0.5, patterns.Block((2, 1))), expected)


def test_block_edges_that_do_not_divide():
    scores = np.array([[4.0, 4.0, 1.0], [4.0, 4.0, 1.0], [1.0, 1.0, 9.0]])
    # Blocks of 2x2: a full one (16), one of 2x1 (2), one of 1x2 (2), one of 1x1 (9); half of four go.
    expected = [[True, True, False], [True, True, False], [False, False, True]]
    np.testing.assert_array_equal(compute_mask(scores, 0.5, patterns.Block((2, 2))), expected)


@pytest.mark.parametrize("shape", [(10, 7), (3, 3, 5, 7)])
def test_blocks_are_whole(shape, generator):
    mask = compute_mask(generator.random(shape), 0.5, patterns.Block((4, 2))).reshape(-1, shape[-1])
    blocks = [mask[row : row + 4, col : col + 2] for row in range(0, mask.shape[0], 4) for col in range(0, mask.shape[1], 2)]
    assert all(block.all() or not block.any() for block in blocks)
    assert sum(not block.any() for block in blocks) == round(0.5 * len(blocks))


def test_n_of_m_by_hand():
    scores = np.array([[1.0], [4.0], [2.0], [3.0], [9.0], [8.0], [7.0], [6.0]])
    mask = compute_mask(scores, 0.5, patterns.NOfM(2, 4))[:, 0]
    np.testing.assert_array_equal(mask, [False, True, False, True, True, True, False, False])


def test_n_of_m_on_its_way_removes_the_lowest_of_those_that_would_go():
    scores = np.array([[1.0], [4.0], [2.0], [3.0], [9.0], [8.0], [7.0], [6.0]])
    mask = compute_mask(scores, 0.25, patterns.NOfM(2, 4))[:, 0]
    np.testing.assert_array_equal(mask, [False, True, False, True, True, True, True, True])


def test_n_of_m_with_equal_scores_keeps_the_first():
    mask = compute_mask(np.ones((4, 1)), 0.5, patterns.NOfM(2, 4))[:, 0]
    np.testing.assert_array_equal(mask, [True, True, False, False])


@pytest.mark.parametrize("group", ["layer", "unit"])
@pytest.mark.parametrize("shape", [(8, 3), (9, 3), (3, 3, 8, 5), (3, 3, 3, 5)])
def test_n_of_m_keeps_at_most_n_of_every_run_of_channels(shape, group, generator):
    mask = compute_mask(generator.random(shape), 0.5, patterns.NOfM(2, 4), group)
    for start in range(0, shape[-2], 4):
        run = mask[..., start : start + 4, :]
        kept = run.sum(axis=-2)
        if group == "layer":
            assert kept.max() == min(2, run.shape[-2])
        if run.shape[-2] == 4 and group == "layer":
            assert kept.min() == 2


def test_what_patterns_say_of_themselves():
    assert patterns.Block().size == (4, 1)
    assert patterns.Block([np.int64(3), 2]).size == (3, 2)
    assert (patterns.NOfM().n, patterns.NOfM().m) == (2, 4)
    assert [patterns.get(name).units_per_cell for name in ("unstructured", "n_of_m", "unit")] == [1, 1, None]
    assert patterns.Block((3, 2)).units_per_cell == 2
    assert [patterns.get(name).most for name in ("unstructured", "block", "unit")] == [1, 1, 1]
    assert patterns.NOfM(1, 4).most == 0.75


def test_cells_of_blocks_with_inputs_and_units_by_hand():
    block = patterns.Block((2, 2))
    scores = np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, 256.0]])
    np.testing.assert_array_equal(block.cells(scores), [[1 + 2 + 8 + 16, 4 + 32], [64 + 128, 256]])
    flags = np.array([[0, 0, 1], [0, 1, 0], [0, 0, 0]], bool)
    np.testing.assert_array_equal(block.any(flags), [[True, True], [False, False]])
    kept = np.array([[True, False], [False, True]])
    expected = [[True, True, False], [True, True, False], [False, False, True]]
    np.testing.assert_array_equal(block.expand(kept, (3, 3)), expected)
    # A convolution's (height, width, channels, filters) as (height * width * channels, filters).
    np.testing.assert_array_equal(block.cells(scores.reshape(3, 1, 1, 3)), block.cells(scores))
    np.testing.assert_array_equal(block.expand(kept, (1, 3, 1, 3)), np.reshape(expected, (1, 3, 1, 3)))
    np.testing.assert_array_equal(scores[0], [1, 2, 4])  # not written to


@pytest.mark.parametrize(("size", "cells"), [((3, 1), [[7.0, 14.0]]), ((9, 9), [[21.0]]), ((1, 2), [[3.0], [6.0], [12.0]])])
def test_blocks_as_large_as_the_kernel_or_larger(size, cells):
    scores = np.array([[1.0, 2.0], [2.0, 4.0], [4.0, 8.0]])
    np.testing.assert_array_equal(patterns.Block(size).cells(scores), cells)
    assert patterns.Block(size).expand(np.ones(np.shape(cells), bool), (3, 2)).all()


def test_blocks_of_a_row_of_units():
    """As `any` is asked which units are read."""
    read = np.array([[True, False, False, False, True]])
    np.testing.assert_array_equal(patterns.Block((4, 2)).any(read), [[True, False, True]])
    np.testing.assert_array_equal(patterns.get("unit").any(read), read)
    np.testing.assert_array_equal(patterns.get("unstructured").any(read[None, None]), read)


def test_cells_of_units_by_hand():
    unit = patterns.get("unit")
    scores = np.arange(8.0).reshape(2, 1, 2, 2)
    np.testing.assert_array_equal(unit.cells(scores), [[0 + 2 + 4 + 6, 1 + 3 + 5 + 7]])
    np.testing.assert_array_equal(unit.any(scores == 2), [[True, False]])
    mask = unit.expand(np.array([[True, False]]), (2, 1, 2, 2))
    np.testing.assert_array_equal(mask, np.broadcast_to([True, False], (2, 1, 2, 2)))
    assert mask.flags.writeable


@pytest.mark.parametrize(
    ("n", "m", "scores", "expected"),
    [
        (2, 4, [1, 4, 2, 3, 5], [0, 1, 0, 1, 1]),  # a run of 1 at the end
        (2, 4, [1, 4, 2, 3, 5, 6, 4], [0, 1, 0, 1, 1, 1, 0]),  # of 3
        (1, 4, [1, 4, 2, 3, 5, 6], [0, 1, 0, 0, 0, 1]),  # of 2
        (2, 4, [3, 2, 1], [1, 1, 0]),  # nothing else
        (2, 4, [-np.inf] * 7, [1, 1, 0, 0, 1, 1, 0]),  # what fills a run up is not taken for a weight
        (1, 3, [-5, -4, -4, -7, -6], [0, 1, 0, 0, 1]),
    ],
)
def test_n_of_m_with_short_runs(n, m, scores, expected):
    cells = patterns.NOfM(n, m).cells(np.array(scores, float)[:, None])
    assert cells.shape == (len(scores), 1)
    np.testing.assert_array_equal(cells[:, 0] == np.inf, np.array(expected, bool))
    np.testing.assert_array_equal(cells[cells < np.inf], np.array(scores, float)[~np.array(expected, bool)])


def test_n_of_m_takes_as_much_as_it_can_give_whatever_the_rounding():
    for n, m in ((1, 3), (2, 3), (1, 10), (7, 10)):
        patterns.NOfM(n, m).check(1 - n / m, "layer")
        patterns.NOfM(n, m).check((m - n) / m, "unit")
        with pytest.raises(ValueError, match="at most"):
            patterns.NOfM(n, m).check((m - n) / m + 1e-6, "layer")


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (3, 8)])
@pytest.mark.parametrize("shape", [(1003, 300), (3, 3, 130, 150)])
def test_n_of_m_in_large_kernels_is_what_sorting_every_run_gives(n, m, shape, generator):
    scores = np.round(generator.random(shape), 2)
    mask = compute_mask(scores, 1 - n / m, patterns.NOfM(n, m))
    for start in range(0, shape[-2], m):
        run = scores[..., start : start + m, :]
        order = np.argsort(-run, axis=-2, kind="stable")
        expected = np.zeros(run.shape, bool)
        np.put_along_axis(expected, order[..., :n, :], True, axis=-2)
        np.testing.assert_array_equal(mask[..., start : start + m, :], expected)


def test_n_of_m_cannot_remove_more():
    with pytest.raises(ValueError, match=r"removes 50% of the weights at most.*sparsity=0.9.*Pass `sparsity=0.5`"):
        compute_mask(np.ones((8, 2)), 0.9, patterns.NOfM(2, 4))


def test_unit_by_hand():
    scores = np.array([[1.0, 5.0, 3.0, 0.0], [1.0, 5.0, 3.0, 9.0]])
    np.testing.assert_array_equal(compute_mask(scores, 0.5, "unit"), [[False, True, False, True]] * 2)


def test_units_cannot_compete_within_a_unit():
    with pytest.raises(ValueError, match="Pass `group='layer'`"):
        compute_mask(np.ones((2, 2)), 0.5, "unit", group="unit")


@pytest.mark.parametrize("size", [(0, 1), (4, 0), (4,), (4, 1, 1), (1.5, 2), (4, 1.5)])
def test_block_of_a_wrong_size(size):
    with pytest.raises(ValueError, match="`size` must be two positive integers"):
        patterns.Block(size)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (1.5, 4), (2, 4.5)])
def test_n_of_m_of_wrong_numbers(n, m):
    with pytest.raises(ValueError, match="0 < n < m"):
        patterns.NOfM(n, m)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"`pattern` is not known. Received: pattern='blocks'.*block.*unstructured"):
        patterns.get("blocks")


def test_a_pattern_must_be_a_pattern():
    with pytest.raises(ValueError, match="must be one of"):
        patterns.get(lambda scores: scores)


class Columns(kr.patterns.Pattern):
    """Whole units, as a pattern of one's own."""

    units_per_cell = None

    def cells(self, scores):
        return super().cells(scores).max(axis=0, keepdims=True)

    def any(self, flags):
        return super().any(flags).any(axis=0, keepdims=True)

    def expand(self, kept, shape):
        return np.broadcast_to(kept.reshape(-1), shape).copy()


class Rows(kr.patterns.Pattern):
    """Whole inputs, whose cells span all units."""

    units_per_cell = None

    def cells(self, scores):
        return super().cells(scores).sum(axis=1, keepdims=True)


def test_which_patterns_remove_units():
    assert [kr.patterns.get(name).by_units for name in ("unstructured", "block", "n_of_m", "unit")] == [False] * 3 + [True]
    assert kr.patterns.Block((8, 1)).by_units is False
    assert Columns().by_units
    assert not Rows().by_units


def test_units_of_a_pattern_of_ones_own_give_zero_and_can_go():
    inputs = keras.Input((5,))
    x = keras.layers.Add()([keras.layers.Dense(8, name=name)(inputs) for name in "ab"])
    model = keras.Model(inputs, keras.layers.Dense(3, name="out")(x))
    for name in "ab":
        model.get_layer(name).bias.assign(np.ones(8))
    pruned = kr.prune(model, 0.5, pattern=Columns(), allocation="uniform")
    dead = [~keras.ops.convert_to_numpy(pruned.get_layer(name).kernel).any(axis=0) for name in "ab"]
    # Those of a sum go together, with their biases; the model's outputs stay.
    np.testing.assert_array_equal(*dead)
    assert dead[0].sum() == 4
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(pruned.get_layer("a").bias), ~dead[0])
    assert [row.layer for row in pruned.pruning_report.rows] == ["a", "b"]
    assert kr.compact(pruned).get_layer("a").kernel.shape == (5, 4)
