"""Which blocks leave and which enter: order, caps, protection of the last block, ties, random growth."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddst.sparsity.criterion import choose_drop, choose_grow, exchange_count, random_scores, relative_keys

floats = st.floats(0, 2.0**100, width=32)
layers = st.lists(st.lists(floats, min_size=1, max_size=12), min_size=1, max_size=4)


def tensors(lists):
    return [torch.tensor(values) for values in lists]


def test_drop_takes_the_smallest_within_a_layer():
    (drop,) = choose_drop([torch.tensor([5.0, 1.0, 3.0, 2.0])], 2)
    assert drop.tolist() == [False, True, False, True]


def test_drop_over_layers_ranks_them_together_and_keeps_each_layers_largest():
    drop = choose_drop(tensors([[5.0, 4.0], [0.1, 0.3, 0.2], [3.0]]), 10)
    # Six blocks, three of which are their layer's largest.
    assert [d.tolist() for d in drop] == [[False, True], [True, False, True], [False]]
    drop = choose_drop(tensors([[5.0, 4.0], [0.1, 0.3, 0.2], [3.0]]), 2)
    assert [d.tolist() for d in drop] == [[False, False], [True, False, True], [False]]


NORMS = [torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])]
ROWS, COLUMNS = [torch.tensor([0, 0, 1, 1, 2, 2])], [torch.tensor([0, 1, 1, 1, 1, 1])]


def test_what_stays_and_the_largest_of_each_line_are_not_dropped():
    def dropped(**limits):
        return choose_drop(NORMS, 6, **limits)[0].tolist()

    assert dropped(stay=[torch.tensor([True] + 5 * [False])]) == [False, True, True, True, True, False]
    assert dropped(lines=[ROWS]) == [True, False, True, False, True, False]
    assert dropped(lines=[ROWS, COLUMNS]) == [False, False, True, False, True, False]
    # What stays anyway is not its line's largest, and a line of such alone asks for no more.
    stay = [torch.tensor([False, True, False, False, True, True])]
    assert dropped(stay=stay, lines=[ROWS]) == [False, False, True, False, False, False]
    # Equal keys: the later one stays.
    pairs = [[torch.tensor([0, 0, 1, 1])]]
    for to_the_last in (False, True):
        (drop,) = choose_drop([torch.ones(4)], 4, lines=pairs, to_the_last=to_the_last)
        assert drop.tolist() == [True, False, True, False]
        (drop,) = choose_drop([torch.ones(0)], 1, lines=[[torch.ones(0)]], to_the_last=to_the_last)
        assert drop.tolist() == []


def test_to_the_last_only_the_last_block_of_each_line_is_passed_over():
    def dropped(**limits):
        return choose_drop(NORMS, 6, to_the_last=True, **limits)[0].tolist()

    assert dropped(lines=[ROWS]) == [True, False, True, False, True, False]
    # The first is its column's only one. Its row keeps it, so that the second may leave, the largest of the row.
    assert dropped(lines=[ROWS, COLUMNS]) == [False, True, True, False, True, False]
    # What stays anyway is enough for its line, and for its layer.
    assert dropped(stay=[torch.tensor([True] + 5 * [False])]) == [False, True, True, True, True, True]
    stay = [torch.tensor([False, True, False, False, True, True])]
    assert dropped(stay=stay, lines=[ROWS]) == [True, False, True, False, False, False]


def one_after_the_other(keys: list[float], staying: list[bool], lines: list[list[int]]) -> list[bool]:
    """What leaves when each block in ascending order does unless it is the last one of a line."""
    there, leaves = [True] * len(keys), [False] * len(keys)
    for block in sorted(range(len(keys)), key=keys.__getitem__):
        left = [sum(there[other] for other, of in enumerate(line) if of == line[block]) for line in lines]
        if not staying[block] and min(left) > 1:
            there[block], leaves[block] = False, True
    return leaves


@given(data=st.data())
def test_to_the_last_blocks_leave_one_after_the_other(data):
    count = data.draw(st.integers(1, 12))

    def numbers(most: int) -> list[int]:
        return data.draw(st.lists(st.integers(0, most), min_size=count, max_size=count))

    keys, staying, lines = numbers(5), [n == 0 for n in numbers(3)], [numbers(4), numbers(3)]
    dropped = choose_drop(
        [torch.tensor(keys, dtype=torch.float64)],
        count,
        stay=[torch.tensor(staying)],
        lines=[[torch.tensor(line)] for line in lines],
        to_the_last=True,
    )
    assert dropped[0].tolist() == one_after_the_other(keys, staying, [[0] * count, *lines])


def test_ties_go_to_the_first_layer_and_the_first_block():
    drop = choose_drop(tensors([[1.0, 1.0, 1.0], [1.0, 1.0]]), 2)
    assert [d.tolist() for d in drop] == [[True, True, False], [False, False]]
    grow = choose_grow(tensors([[1.0, 1.0, 1.0], [1.0, 1.0]]), 4)
    assert [g.tolist() for g in grow] == [[True, True, True], [True, False]]


def test_cap_on_the_dropped_share_of_squared_norm():
    norms = [torch.tensor([1.0, 1.0, 1.0, 1.0, 4.0])]  # squared norm 20, of which each small block holds 5 %
    assert choose_drop(norms, 4, max_norm_share=0.10)[0].sum() == 2
    assert choose_drop(norms, 4, max_norm_share=0.15)[0].sum() == 3
    assert choose_drop(norms, 4, max_norm_share=0.0)[0].sum() == 0
    assert choose_drop(norms, 4, max_norm_share=1.0)[0].sum() == 4
    assert choose_drop(norms, 4)[0].sum() == 4


def test_amounts_in_weights_come_as_near_as_blocks_allow():
    sizes = [torch.tensor([100, 100, 10, 10])]
    norms = [torch.tensor([1.0, 2.0, 3.0, 4.0])]
    assert choose_drop(norms, 140, sizes=sizes)[0].tolist() == [True, False, False, False]
    assert choose_drop(norms, 160, sizes=sizes)[0].tolist() == [True, True, False, False]
    assert choose_drop(norms, 150, sizes=sizes)[0].tolist() == [True, False, False, False]  # equally near: fewer
    assert choose_grow(norms, 15, sizes=sizes)[0].tolist() == [False, False, False, True]


def test_norms_that_are_not_finite_leave_first_and_such_scores_enter_last():
    norms = [torch.tensor([1.0, math.nan, math.inf, 2.0])]
    assert choose_drop(norms, 2)[0].tolist() == [False, True, True, False]
    assert choose_drop(norms, 2, max_norm_share=0.0)[0].tolist() == [False, True, True, False]
    scores = [torch.tensor([math.nan, 0.0, math.inf, 2.0])]
    assert choose_grow(scores, 2)[0].tolist() == [False, True, False, True]


def test_relative_keys_make_layers_comparable():
    # The second layer's blocks are ten times smaller and four times as large: raw norms would rank the layers.
    first, second = torch.tensor([3.0, 5.0]), torch.tensor([0.6, 1.0])
    keys = [relative_keys(first, torch.tensor([16, 16])), relative_keys(second, torch.tensor([64, 64]))]
    torch.testing.assert_close(keys[0], keys[1])
    rms = math.sqrt((9 + 25) / 32)
    assert keys[0].tolist() == pytest.approx([3 / 4 / rms, 5 / 4 / rms])


def test_relative_keys_divide_by_the_active_blocks_only():
    keys = relative_keys(torch.tensor([2.0, 8.0]), torch.tensor([4, 4]), torch.tensor([True, False]))
    assert keys.tolist() == pytest.approx([1.0, 4.0])
    zero = relative_keys(torch.tensor([0.0, 3.0]), torch.tensor([9, 9]), torch.tensor([True, False]))
    assert zero.isfinite().all()
    assert zero[1] > zero[0]


@given(layers, st.integers(0, 40))
def test_drop_then_grow_conserves_the_count_and_empties_no_layer(lists, amount):
    norms = tensors(lists)
    dropped = choose_drop(norms, amount)
    count = sum(int(d.sum()) for d in dropped)
    assert count == min(amount, sum(len(values) - 1 for values in lists))
    assert all(not d.all() for d in dropped)
    grown = choose_grow(norms, count)
    assert sum(int(g.sum()) for g in grown) == count


@given(layers, st.integers(1, 40), st.floats(0, 1))
def test_no_kept_block_that_could_leave_is_smaller_than_a_dropped_one(lists, amount, share):
    norms = tensors(lists)
    dropped = choose_drop(norms, amount, max_norm_share=share)
    largest = max((float(n[d].max()) for n, d in zip(norms, dropped, strict=True) if d.any()), default=0.0)
    for values, gone in zip(norms, dropped, strict=True):
        stay = values[~gone].sort().values[:-1]  # all but the protected one
        assert (stay >= largest).all()
    squares = [n.double() ** 2 for n in norms]
    lost = sum(float(s[d].sum()) for s, d in zip(squares, dropped, strict=True))
    assert lost <= share * sum(float(s.sum()) for s in squares) * (1 + 1e-9)


@given(st.lists(floats, min_size=1, max_size=20), st.data())
def test_relative_keys_are_finite_and_keep_the_order_within_a_layer(values, data):
    norms = torch.tensor(values)
    active = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    keys = relative_keys(norms, torch.full_like(norms, 16), active)
    assert keys.isfinite().all()
    order = norms.double().sort(stable=True).indices
    assert (keys[order].diff() >= 0).all()


@given(st.integers(1, 500), st.floats(0, 1))
def test_exchange_count_leaves_a_block(active, fraction):
    count = exchange_count(active, fraction)
    assert 0 <= count <= active - 1
    assert count <= fraction * active + 1e-9


def test_random_growth_is_uniform_and_repeats_with_its_generator():
    generator = torch.Generator().manual_seed(1)
    hits = torch.zeros(8)
    for _ in range(2000):
        grown = choose_grow(random_scores([3, 5], generator), 2)
        hits += torch.cat(grown)
    assert hits.sum() == 4000
    assert (hits - 500).abs().max() < 5 * math.sqrt(2000 * 0.25 * 0.75)
    first, second = (random_scores([4], torch.Generator().manual_seed(7))[0] for _ in range(2))
    assert torch.equal(first, second)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="max_norm_share"):
        choose_drop([torch.ones(3)], 1, max_norm_share=1.5)
    with pytest.raises(ValueError, match="amount"):
        choose_grow([torch.ones(3)], -1)
    with pytest.raises(ValueError, match="amount"):
        choose_grow([torch.ones(3)], math.nan)
