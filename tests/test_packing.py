"""Packing: hand-worked rows and batches, and losses and gradients that equal those of single unpadded documents."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataset.packing import Collator, Rows, best_fit, cut_to_fill
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

PAD = 0


class Documents:
    """What `Rows` needs of a dataset, from lists of token ids and of 0/1 for those that are trained."""

    def __init__(self, documents, max_length, may_cut=False):
        self.may_cut = may_cut
        self.documents, self.max_length, self.report = documents, max_length, {"rows": len(documents)}
        self.lengths = np.array([len(ids) for ids, _ in documents])

    def take(self, indices, offsets=None, lengths=None):
        parts = [self.documents[i] for i in indices]
        if offsets is not None:
            cuts = [slice(a, a + n) for a, n in zip(offsets, lengths, strict=True)]
            parts = [(ids[cut], mask[cut]) for (ids, mask), cut in zip(parts, cuts, strict=True)]
        trained = [[0, *mask[1:]] for _, mask in parts]
        return (
            np.concatenate([np.array(ids, np.int64) for ids, _ in parts]),
            np.concatenate(trained).astype(bool),
            np.array([len(ids) for ids, _ in parts]),
        )

    def summary(self):
        return f"{len(self.documents)} documents"


def some_documents(count, max_length, seed=0, vocab=None):
    """Documents of random tokens; without a vocab every token is unlike all others, so that each can be told."""
    rng, fresh, documents = random.Random(seed), 1, []
    for _ in range(count):
        length = rng.randint(2, max_length)
        ids = [rng.randrange(3, vocab) for _ in range(length)] if vocab else list(range(fresh, fresh + length))
        fresh += length
        documents.append((ids, [rng.randint(0, 1) for _ in range(length)]))
    return documents


def documents_of(batch):
    """(ids, labels) of every document of a batch, found by document_ids alone."""
    found = []
    for ids, labels, numbers in zip(batch["input_ids"], batch["labels"], batch["document_ids"], strict=True):
        for number in range(1, int(numbers.max()) + 1):
            here = numbers == number
            found.append((tuple(ids[here].tolist()), tuple(labels[here].tolist())))
    return found


def wanted(documents):
    return [
        (tuple(ids), tuple(token if t and i else -100 for i, (token, t) in enumerate(zip(ids, trained, strict=True))))
        for ids, trained in documents
    ]


# --- which document goes where ----------------------------------------------------------------------------------------


def rows_of(lengths, capacity):
    """The lengths in each row, as best_fit places them."""
    rows = {}
    for length, row in zip(sorted(lengths, reverse=True), best_fit(np.array(lengths, int), capacity), strict=True):
        rows.setdefault(int(row), []).append(length)
    return [rows[r] for r in sorted(rows)]


def naive_best_fit(lengths, capacity):
    """One document after the other into the fullest row that has room."""
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


def test_best_fit_worked_by_hand():
    # 6 and 5 open rows; 4 goes to 6 (room 4, full), 3 to 5 (room 5), 2 to the same (room 2)
    assert rows_of([4, 6, 3, 5, 2], 10) == [[6, 4], [5, 3, 2]]
    # first fit would put the 3 beside the 6; the 7 leaves less room, and 3 fits it exactly
    assert rows_of([6, 7, 3], 10) == [[7, 3], [6]]
    assert rows_of([5, 5, 5], 10) == [[5, 5], [5]]
    assert rows_of([], 10) == []


@pytest.mark.parametrize("seed", range(30))
def test_best_fit_equals_the_naive_one(seed):
    rng = random.Random(seed)
    capacity = rng.choice([10, 64, 512])
    lengths = [rng.randint(1, rng.choice([capacity, capacity // 3])) for _ in range(rng.randint(1, 300))]
    found, naive = rows_of(lengths, capacity), naive_best_fit(lengths, capacity)
    # of rows with equal room either may be taken, so the rows agree in how full they are
    assert sorted(map(sum, found)) == sorted(map(sum, naive)) and sorted(sum(found, [])) == sorted(lengths)


def test_best_fit_refuses_what_fits_nowhere():
    with pytest.raises(ValueError, match="11 tokens but a row holds 10"):
        best_fit(np.array([3, 11]), 10)


def test_a_million_documents_are_packed_in_no_time_and_nearly_full():
    lengths = np.minimum(np.random.default_rng(0).lognormal(4.5, 0.8, 1_000_000).astype(int) + 2, 512)
    rows = best_fit(lengths, 512)
    loads = np.bincount(rows, weights=np.sort(lengths)[::-1])
    assert loads.max() <= 512 and loads.sum() == lengths.sum()
    assert loads.mean() / 512 > 0.99


# --- documents that are cut to fill rows -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_cut_documents_fill_the_rows_and_each_token_is_predicted_once(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(rng.choice([1, 40]), 64) for _ in range(rng.randint(1, 200))]
    documents = [([1000 * d + t for t in range(n)], [1] * n) for d, n in enumerate(lengths)]
    whole, cut = (Rows(Documents(documents, 64, may_cut)) for may_cut in (False, True))
    assert len(cut) <= len(whole) and max(len(cut[i][0]) for i in range(len(cut))) <= 64
    if len(whole) > 40 and whole.report["fill"] < 0.9:
        assert cut.report["fill"] > 0.95 and cut.report["cut_to_fill"]
    predicted = []
    for i in range(len(cut)):
        ids, trained, row_lengths = cut[i]
        assert not trained[np.cumsum(row_lengths) - row_lengths].any()
        assert (np.diff(ids)[trained[1:]] == 1).all()  # each one behind the token before it, in its own document
        predicted += ids[trained].tolist()
    assert sorted(predicted) == sorted(token for ids, _ in documents for token in ids[1:])


def test_cut_worked_by_hand():
    """Rows of 10 with 7, 7 and 4: the 4 is cut into 3 tokens, and 2 of which the first was the last before."""
    parts, rows = cut_to_fill(np.array([7, 7, 4]), np.array([0, 1, 2]), 10)
    assert parts.documents.tolist() == [0, 1, 2, 2] and rows.tolist() == [0, 1, 0, 1]
    assert parts.offsets.tolist() == [0, 0, 0, 2] and parts.lengths.tolist() == [7, 7, 3, 2]
    # with 5 the gaps, less a token each that the parts share, do not do: nothing is cut
    parts, rows = cut_to_fill(np.array([7, 7, 5]), np.array([0, 1, 2]), 10)
    assert parts.lengths.tolist() == [7, 7, 5] and rows.tolist() == [0, 1, 2]


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_each_document_is_in_one_row_in_every_epoch(packing):
    documents = some_documents(60, 40)
    rows = Rows(Documents(documents, 40), packing, seed=3)
    before = len(rows)
    for epoch in (0, 1, 5):
        rows.set_epoch(epoch)
        batch = Collator(40, PAD)([rows[i] for i in range(len(rows))])
        assert sorted(documents_of(batch)) == sorted(wanted(documents))
    assert len(rows) == before and (len(rows) < 60 if packing else len(rows) == 60)


def test_epochs_deal_anew_and_repeat_exactly():
    rows = Rows(Documents(some_documents(200, 40), 40), seed=3)

    def deal(epoch):
        rows.set_epoch(epoch)
        return [tuple(rows.parts(i).documents) for i in range(len(rows))]

    first, second = deal(0), deal(1)
    assert first != second and deal(0) == first
    other = Rows(Documents(some_documents(200, 40), 40), seed=4)
    assert [tuple(other.parts(i).documents) for i in range(len(other))] != first


def test_report_and_summary_tell_the_fill():
    documents = [([1] * n, [1] * n) for n in (6, 4, 5)]
    packed, single = Rows(Documents(documents, 10)), Rows(Documents(documents, 10), packing=False)
    assert packed.report["packed_rows"] == 2 and packed.report["fill"] == 0.75
    assert single.report["packed_rows"] == 3 and single.report["fill"] == 0.5
    assert "packed into 2 rows of 10 tokens, 75.0% full" in packed.summary()
    assert "one to a row of 10 tokens, 50.0% full" in single.summary()


def test_there_is_no_row_behind_the_last():
    rows = Rows(Documents(some_documents(5, 8), 8))
    with pytest.raises(IndexError):
        rows[len(rows)]


# --- batches ----------------------------------------------------------------------------------------------------------


def row(*documents):
    """A row as `Rows` gives it."""
    return Documents(list(documents), 99).take(range(len(documents)))


def test_batch_worked_by_hand():
    rows = [row(([11, 12, 13], [1, 0, 1]), ([31, 32], [0, 1])), row(([21, 22, 23, 24, 25, 26], [0, 0, 0, 1, 1, 1]))]
    batch = Collator(6, PAD)(rows)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 31, 32, 0], [21, 22, 23, 24, 25, 26]]
    assert batch["labels"].tolist() == [[-100, -100, 13, -100, 32, -100], [-100, -100, -100, 24, 25, 26]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert batch["document_ids"].tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 6, 12]  # the rest of row 1 is a document of its own
    assert batch["label_positions"].tolist() == [1, 3, 8, 9, 10]
    dtypes = {name: tensor.dtype for name, tensor in batch.items()}
    assert dtypes.pop("cu_seqlens") == torch.int32 and set(dtypes.values()) == {torch.int64}


def test_another_pad_id_and_pads_inside_a_document():
    batch = Collator(5, 9)([row(([3, 9, 4], [0, 1, 1]))])
    assert batch["input_ids"].tolist() == [[3, 9, 4, 9, 9]] and batch["labels"].tolist() == [[-100, 9, 4, -100, -100]]


def test_a_row_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="6 tokens but may hold 5"):
        Collator(5, PAD)([row(([1, 2, 3, 4, 5, 6], [1] * 6))])


# --- the same losses and gradients as documents alone -----------------------------------------------------------------

YARN = {"inference_rope_scaling": True, "yarn": {"original_max_position_embeddings": 16, "factor": 4.0}}
MODELS = {
    "v2": {},
    "v3": {"qk_norm": True, "num_key_value_heads": 4},
    "moe": {"use_moe": True, "n_routed_experts": 3, "aux_loss_alpha": 0.1},
    "yarn": YARN,
    "moe and yarn": {"use_moe": True, "n_routed_experts": 3, "aux_loss_alpha": 0.1, **YARN},
}
WAYS = {"operator": (), "mask": ("cu_seqlens", "label_positions")}  # what is left out of the batch


def a_model(**sizes):
    torch.manual_seed(0)
    config = MiniMindConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **sizes)
    model = MiniMindForCausalLM(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)  # wide enough that a wrong neighbour shows
    return model


def alone(model, documents):
    """Losses of all trained tokens, each document in a batch of its own without padding, and the gradients."""
    model.zero_grad()
    losses, total, aux, tokens = {}, 0.0, 0.0, 0
    for number, (ids, trained) in enumerate(documents):
        ids, labels = torch.tensor([ids]), torch.tensor(wanted([(ids, trained)])[0][1])[None]
        output = model(ids, labels=labels)
        per_token = F.cross_entropy(output.logits[0, :-1], labels[0, 1:], reduction="none")
        losses |= {(number, t): per_token[t].item() for t in range(len(per_token)) if labels[0, t + 1] != -100}
        total, tokens = total + per_token.sum(), tokens + int(output.tokens)
        aux = aux + output.aux_loss * output.tokens
    (total / tokens + aux / tokens).backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters()}


def packed(model, documents, way, max_length=40, seed=1):
    """The same from one packed batch."""
    model.zero_grad()
    rows = Rows(Documents(documents, max_length), seed=seed)
    batch = Collator(max_length, PAD)([rows[i] for i in range(len(rows))])
    order = [int(i) for r in range(len(rows)) for i in rows.parts(r).documents]
    batch = {name: tensor for name, tensor in batch.items() if name not in WAYS[way]}
    output = model(**batch)
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    per_token = F.cross_entropy(output.logits.flatten(0, 1), shifted.flatten(), reduction="none").view_as(shifted)
    losses, seen = {}, -1
    for r in range(len(rows)):
        numbers = batch["document_ids"][r].tolist()
        for t, number in enumerate(numbers):
            if number and (t == 0 or number != numbers[t - 1]):
                seen += 1
            if shifted[r, t] != -100:
                losses[order[seen], int(batch["position_ids"][r, t])] = per_token[r, t].item()
    assert abs(per_token.sum().item() - output.loss_sum.item()) < 1e-3
    (output.loss_sum / output.tokens + output.aux_loss).backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_gradients_equal_those_of_documents_alone(kind, way):
    model, documents = a_model(**MODELS[kind]), some_documents(25, 40, vocab=64)
    documents = [(ids, [0, 1, *trained[2:]]) for ids, trained in documents]
    losses, gradients = alone(model, documents)
    found, its_gradients = packed(model, documents, way)
    assert found.keys() == losses.keys() and len(losses) > 100
    assert max(abs(found[place] - losses[place]) for place in losses) < 1e-5
    assert max((gradients[name] - its_gradients[name]).abs().max() for name in gradients) < 1e-5


def test_dropout_goes_by_the_mask_and_still_keeps_documents_apart():
    """Attention dropout has no kernel here; at 0.3 the packed forward differs, but no document sees another."""
    model = a_model(dropout=0.3)
    documents = some_documents(6, 20, vocab=64)
    rows = Rows(Documents(documents, 60))
    batch = Collator(60, PAD)([rows[i] for i in range(len(rows))])
    before, after = [], []
    changed = batch | {"input_ids": torch.where(batch["document_ids"] == 2, 5, batch["input_ids"])}
    for inputs, outputs in ((batch, before), (changed, after)):
        torch.manual_seed(0)
        outputs.append(model.train()(**inputs).logits)
    same = batch["document_ids"] != 2
    assert torch.equal(before[0][same], after[0][same]) and not torch.equal(before[0][~same], after[0][~same])


def test_parts_of_cut_documents_are_documents_of_their_own():
    model, documents = a_model(), [(ids, [1] * len(ids)) for ids, _ in some_documents(60, 40, vocab=64)]
    documents = [(ids, trained) for ids, trained in documents if len(ids) > 22]  # no two fit into a row
    rows = Rows(Documents(documents, 40, may_cut=True))
    assert rows.report["cut_to_fill"] > 3 and rows.report["fill"] > 0.9
    parts = []
    for r in range(len(rows)):
        for document, offset, length in zip(*rows.parts(r), strict=True):
            ids, trained = documents[document]
            parts.append((ids[offset : offset + length], trained[offset : offset + length]))
    losses, gradients = alone(model, parts)
    model.zero_grad()
    output = model(**Collator(40, PAD)([rows[i] for i in range(len(rows))]), return_logits=False)
    (output.loss_sum / output.tokens).backward()
    assert output.tokens == len(losses) == sum(len(ids) - 1 for ids, _ in documents)
    assert abs(output.loss_sum.item() - sum(losses.values())) < 1e-3
    assert max((p.grad - gradients[name]).abs().max() for name, p in model.named_parameters()) < 1e-5


def test_cu_seqlens_alone_keep_documents_apart_where_there_is_no_kernel():
    """A cache, a mask or dropout: each takes the way of the mask, which is then made from cu_seqlens."""
    model = a_model().eval()
    rows = Rows(Documents(some_documents(9, 20, vocab=64), 40))
    batch = Collator(40, PAD)([rows[i] for i in range(len(rows))])
    given = {name: batch[name] for name in ("input_ids", "position_ids", "cu_seqlens")}
    expected, real = model(**given).logits, batch["document_ids"] > 0
    cached = model(**given, use_cache=True)
    assert cached.past_key_values.get_seq_length() == 40
    masked = model(**given, attention_mask=real.long())
    for output in (cached, masked):
        assert (output.logits - expected)[real].abs().max() < 1e-5
    changed = given | {"input_ids": torch.where(batch["document_ids"] == 2, 5, batch["input_ids"])}
    assert torch.equal(
        model(**changed, use_cache=True).logits[batch["document_ids"] != 2], cached.logits[batch["document_ids"] != 2]
    )
