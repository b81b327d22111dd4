"""The collator: hand-worked batches, and packed rows that hold exactly the documents that padded rows hold."""

import random
import time

import numpy as np
import pytest
import torch

from dataset.packing import Collator, first_fit_decreasing

PAD = 0


def make_item(ids, trained, width):
    """A dataset's item from token ids and a 0/1 list of the tokens that are trained."""
    padded = torch.tensor(list(ids) + [PAD] * (width - len(ids)))
    mask = torch.tensor(list(trained) + [0] * (width - len(ids)))
    return padded[:-1], padded[1:], mask[1:]


def random_items(count, width, seed):
    """Items whose every token is unlike all others, so that documents can be told apart, and their (ids, labels)."""
    rng = random.Random(seed)
    items, documents, fresh = [], [], 1
    for _ in range(count):
        length = rng.randint(2, width)
        ids = list(range(fresh, fresh + length))
        fresh += length
        trained = [rng.randint(0, 1) for _ in ids]
        items.append(make_item(ids, trained, width))
        labels = [token if t and i else -100 for i, (token, t) in enumerate(zip(ids, trained, strict=True))]
        documents.append((tuple(ids), tuple(labels)))
    return items, documents


def documents_of(batch):
    """(ids, labels) of every document of a batch, found by document_ids alone."""
    found = []
    for ids, labels, numbers in zip(batch["input_ids"], batch["labels"], batch["document_ids"], strict=True):
        for number in range(1, int(numbers.max()) + 1):
            here = numbers == number
            found.append((tuple(ids[here].tolist()), tuple(labels[here].tolist())))
    return found


def test_packed_batch_worked_by_hand():
    items = [
        make_item([11, 12, 13], [1, 0, 1], 6),
        make_item([21, 22, 23, 24, 25, 26], [0, 0, 0, 1, 1, 1], 6),
        make_item([31, 32], [0, 1], 6),
    ]
    batch = Collator(6, PAD)(items)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 31, 32, 0], [21, 22, 23, 24, 25, 26]]
    assert batch["labels"].tolist() == [[-100, -100, 13, -100, 32, -100], [-100, -100, -100, 24, 25, 26]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert batch["document_ids"].tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_unpacked_batch_worked_by_hand():
    items = [make_item([31, 32], [0, 1], 6), make_item([11, 12, 13], [1, 1, 0], 6)]
    batch = Collator(6, PAD, pack=False)(items)
    assert batch["input_ids"].tolist() == [[31, 32, 0], [11, 12, 13]]
    assert batch["labels"].tolist() == [[-100, 32, -100], [-100, 12, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0], [0, 1, 2]]
    assert batch["document_ids"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_the_width_is_the_longest_row_not_max_length():
    items = [make_item([1, 2, 3], [0, 1, 1], 100) for _ in range(3)]
    assert Collator(100, PAD)(items)["input_ids"].shape == (1, 9)
    assert Collator(100, PAD, pack=False)(items)["input_ids"].shape == (3, 3)


@pytest.mark.parametrize("seed", range(5))
def test_packed_holds_the_same_documents_as_unpacked_and_as_the_items(seed):
    items, documents = random_items(40, 64, seed)
    packed, unpacked = Collator(64, PAD)(items), Collator(64, PAD, pack=False)(items)
    assert documents_of(unpacked) == documents  # in order
    assert sorted(documents_of(packed)) == sorted(documents)  # each once, whole
    assert packed["input_ids"].shape[0] < len(items)


@pytest.mark.parametrize("pack", [True, False])
def test_positions_first_labels_and_padding(pack):
    items, _ = random_items(30, 50, seed=7)
    batch = Collator(50, PAD, pack)(items)
    for ids, labels, positions, numbers in zip(*(batch[k].tolist() for k in batch), strict=True):
        expected, last = [], 0
        for number in numbers:
            expected.append(0 if number != last or number == 0 else expected[-1] + 1)
            last = number
        assert positions == expected
        used = [number for number in numbers if number]
        assert numbers == sorted(used) + [0] * (len(numbers) - len(used))  # documents in order, pads at the end
        assert sorted(set(used)) == list(range(1, len(set(used)) + 1))
        for t, number in enumerate(numbers):
            if t == 0 or number != numbers[t - 1]:
                assert labels[t] == -100
            if number == 0:
                assert (ids[t], labels[t], positions[t]) == (PAD, -100, 0)


def test_the_trained_pairs_are_those_of_the_items():
    """Shifted as a model does it, the labels give the (previous token, token) pairs that X, Y and mask give."""
    items, _ = random_items(20, 40, seed=3)
    wanted = sorted((x[i].item(), y[i].item()) for x, y, mask in items for i in range(39) if mask[i])
    batch = Collator(40, PAD)(items)
    trained = batch["labels"][:, 1:] != -100
    pairs = zip(batch["input_ids"][:, :-1][trained].tolist(), batch["labels"][:, 1:][trained].tolist(), strict=True)
    assert sorted(pairs) == wanted


def test_only_trailing_pads_are_trimmed():
    inner = make_item([5, PAD, 7], [0, 0, 1], 6)  # a pad id inside a document
    trained_end = make_item([5, 6, PAD], [0, 1, 1], 6)  # a pad id that is trained, as where eos is the pad token
    full = make_item([1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 1], 6)  # the last token exists in Y only
    batch = Collator(6, PAD, pack=False)([inner, trained_end, full])
    assert documents_of(batch) == [
        ((5, PAD, 7), (-100, -100, 7)),
        ((5, 6, PAD), (-100, 6, PAD)),
        ((1, 2, 3, 4, 5, 6), (-100, -100, -100, -100, -100, 6)),
    ]


def test_another_pad_id():
    x = torch.tensor([[3, 4, 9, 9]])
    batch = Collator(5, 9)([(x[0], torch.tensor([4, 9, 9, 9]), torch.tensor([1, 0, 0, 0]))] * 2)
    assert batch["input_ids"].tolist() == [[3, 4, 3, 4]]
    assert Collator(2, 9)([(x[0], torch.tensor([4, 9, 9, 9]), torch.tensor([1, 0, 0, 0]))])["labels"].tolist() == [
        [-100, 4]
    ]


def best_number_of_rows(lengths, capacity):
    """The least number of rows, by trying every assignment."""
    best = len(lengths)

    def place(index, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if index == len(lengths):
            best = len(rooms)
            return
        for r in range(len(rooms)):
            if rooms[r] >= lengths[index]:
                place(index + 1, rooms[:r] + [rooms[r] - lengths[index]] + rooms[r + 1 :])
        place(index + 1, rooms + [capacity - lengths[index]])

    place(0, [])
    return best


@pytest.mark.parametrize("seed", range(20))
def test_first_fit_decreasing_is_close_to_the_best(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 10) for _ in range(9)]
    rows = first_fit_decreasing(np.array(lengths), 10)
    assert sorted(sum(rows, [])) == list(range(9))
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows)
    assert len(rows) <= best_number_of_rows(lengths, 10) + 1


def test_first_fit_decreasing_worked_by_hand():
    # by length: 6 (#1), 5 (#3), 4 (#0), 3 (#2), 2 (#4); 6+4 fill the first row, 5+3+2 the second
    assert first_fit_decreasing(np.array([4, 6, 3, 5, 2]), 10) == [[0, 1], [2, 3, 4]]
    assert first_fit_decreasing(np.array([5, 5, 5]), 10) == [[0, 1], [2]]


def test_packing_is_deterministic():
    items, _ = random_items(50, 64, seed=1)
    first, second = Collator(64, PAD)(items), Collator(64, PAD)(items)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_document_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="6 tokens but a row holds 5"):
        Collator(5, PAD)([make_item([1, 2, 3, 4, 5, 6], [1] * 6, 6)])


def test_items_without_a_token_are_left_out_or_refused():
    empty = make_item([], [], 4)
    batch = Collator(4, PAD)([empty, make_item([1, 2], [0, 1], 4)])
    assert batch["input_ids"].tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="none of the 2 items has a token"):
        Collator(4, PAD)([empty, empty])


def test_a_batch_takes_milliseconds():
    items, _ = random_items(64, 512, seed=0)
    collate = Collator(512, PAD)
    best = min(timed(collate, items) for _ in range(10))
    assert best < 0.01, f"{best * 1e3:.1f} ms"  # measured: under 1 ms


def timed(function, argument):
    start = time.perf_counter()
    function(argument)
    return time.perf_counter() - start
