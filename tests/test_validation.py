"""The held-back loss: the mean over tokens, whatever the batches, and bits per byte of the text."""

import math

import pytest
import torch
from transformers import AutoTokenizer

from dataset.lm_dataset import PretrainDataset
from dataset.packing import Collator, Rows
from trainer.validation import LossSum, perplexity, token_bytes

TEXTS = ["你好，世界。Hello, world!\n", "naïve café — 100 % 🙂", "<|im_start|> as text", "  two  spaces\t"]


def test_bytes_of_tokens_add_up_to_the_text(tokenizer):
    sizes = token_bytes(tokenizer)
    assert sizes.shape == (len(tokenizer),) and (sizes >= 0).all()
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert sizes[ids].sum() == len(text.encode())
    assert sizes[tokenizer.eos_token_id] == 0


def test_a_tokenizer_that_is_not_of_bytes_has_none(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    assert token_bytes(AutoTokenizer.from_pretrained(tmp_path)) is None


def test_bits_per_byte_of_packed_rows(tmp_path, tokenizer):
    """One bit for each byte of the text: whatever is packed, cut or padded, each byte is counted once."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "第{n}天，天气很好。{"sunny " * n}"}}\n' for n in range(40)), encoding="utf-8")
    rows = Rows(PretrainDataset(path, tokenizer, 64), cut=False)
    total = LossSum(tokenizer)
    for index in range(len(rows)):
        batch = Collator(64, tokenizer.pad_token_id)([rows[index]])
        for total.is_filler in (False, True):  # a row that another process counts
            total.count_bytes(batch)
            total.add(torch.tensor(10.0), torch.tensor(5.0))
    text = sum(len(f"第{n}天，天气很好。{'sunny ' * n}".encode()) for n in range(40))
    assert total.bytes == text
    loss, bits = total.mean()
    assert loss == 2.0 and bits == pytest.approx(len(rows) * 10 / math.log(2) / text)
    assert total.bytes_of is not None and perplexity(0.0) == 1.0 and perplexity(1e9) == math.exp(700)


def test_the_mean_is_over_tokens_and_nothing_is_no_error():
    total = LossSum()
    assert total.mean() == (0.0, None)
    total.add(torch.tensor(2.0), torch.tensor(1))
    total.add(torch.tensor(1.0), torch.tensor(5))
    assert total.mean() == (0.5, None)
