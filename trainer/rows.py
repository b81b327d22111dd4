"""What the language-model stages train on: rows from the cache, from memory, or from a stream, as the flags say.

dataset, val_dataset, collate = open_rows(args, tokenizer, SFTDataset, train_on=args.train_on)
"""

from __future__ import annotations

from dataset.lm_dataset import TokenRows
from dataset.packing import Collator, Rows
from dataset.streaming import StreamedRows
from trainer.arguments import data_source
from trainer.trainer_utils import Logger, get_world_size


def open_rows(args, tokenizer, kind: type[TokenRows], **options):
    """(rows to train on, held-back rows or None, the collator for both).

    Args:
        kind: PretrainDataset or SFTDataset; options: further arguments of it.

    Raises:
        ValueError, OSError: what the dataset raises; --streaming without --max_steps.
    """

    def read(path, cut=True):
        where = data_source(path), tokenizer, args.max_seq_len, args.on_bad_row
        return Rows(kind(*where, cache_dir=args.cache_dir, **options), args.packing, args.seed, cut)

    dataset = _stream(args, tokenizer, kind.recipe(**options)) if args.streaming else read(args.data_path)
    Logger(f"data: {dataset.summary()}")
    val_dataset = read(args.val_path, cut=False) if args.val_path else None
    return dataset, val_dataset, Collator(args.max_seq_len, tokenizer.pad_token_id)


def _stream(args, tokenizer, recipe) -> StreamedRows:
    if args.max_steps < 1:
        raise ValueError("--streaming 1 reads without end: say by --max_steps after how many updates the run is over")
    length = args.max_steps * args.accumulation_steps * args.batch_size * get_world_size()
    how = length, args.packing, args.seed, args.on_bad_row
    return StreamedRows(data_source(args.data_path), tokenizer, recipe, args.max_seq_len, *how)
