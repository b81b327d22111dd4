"""What the language-model stages train on: rows of one or more sources, from the cache, from memory, or from a stream.

dataset, val_dataset, collate = open_rows(args, tokenizer, SFTDataset, train_on=args.train_on)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from dataset.encode import FrozenTokenizer
from dataset.lm_dataset import TokenRows
from dataset.packing import Collator, Rows
from dataset.sources import MixedRows, Sampling, Source, leaks, read_sampling, split_source
from dataset.streaming import StreamedRows
from trainer.arguments import data_source, input_path
from trainer.trainer_utils import Logger, get_world_size


def open_rows(args, tokenizer, kind: type[TokenRows], **options):
    """(rows to train on, held-back rows or None, the collator for both).

    The rows to train on have `stats`, a list of counts for each source of --data_path (see `dataset.sources.Source`),
    `digest`, a sha256 that is the same only for the same rows in the same order, and `where(index)`, which names the
    documents of a row.

    Args:
        kind: PretrainDataset or SFTDataset; options: further arguments of it.

    Raises:
        ValueError, OSError: what the dataset and `dataset.sources.read_sampling` raise; no row is left to train on,
            or none to hold back; --streaming without --max_steps, or with what a stream cannot do.
    """
    how = {"max_length": args.max_seq_len, "on_bad_row": args.on_bad_row, "cache_dir": args.cache_dir}
    read = partial(kind, tokenizer=tokenizer, may_be_empty=True, **how, **options)
    recipe, sources = kind.recipe(**options), []
    if args.streaming:
        dataset = _stream(args, tokenizer, recipe)
    else:
        sources = _training_sources(args, read)
        dataset = Rows(_mix(sources), args.packing, args.seed)
        dataset.stats = [source.stats for source in sources]
        dataset.digest = _digest(args, tokenizer, recipe, sources)
    Logger(f"data: {dataset.summary()}")
    held_back = _held_back(args, sources, read)
    if sources and held_back is not None:
        _warn_of_leaks(args, sources, dataset.dataset, held_back)
    val_dataset = None if held_back is None else Rows(held_back, args.packing, args.seed, cut=False)
    return dataset, val_dataset, Collator(args.max_seq_len, tokenizer.pad_token_id)


def _read(paths: Sequence[str], read: partial) -> list[TokenRows]:
    """All rows of each source; one that is given several times is read once."""
    found = {}
    for path in paths:
        where = data_source(path)
        if where not in found:
            found[where] = read(where)
    return [found[data_source(path)] for path in paths]


def _training_sources(args, read: partial) -> list[Source]:
    """What of each --data_path is trained on and held back, said for each where there are several."""
    names = [str(path) for path in args.data_path]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            Logger(f"note: {name} is given {names.count(name)} times: its rows are trained on as often in each epoch")
    samplings = read_sampling(args.sampling and input_path(args.sampling), names, _default_sampling(args))
    wanted = [name for name, sampling in zip(names, samplings, strict=True) if not sampling.skips]
    data = iter(_read(wanted, read))
    sources = []
    for name, sampling in zip(names, samplings, strict=True):
        source = split_source(name, None if sampling.skips else next(data), sampling, args.seed)
        sources.append(source)
        if len(names) > 1 and source.train:
            Logger(f"data: {name}: {source.train.summary()}")
    empty = [source for source in sources if not source.train]
    if len(empty) == len(sources):
        raise ValueError("; ".join(dict.fromkeys(source.why_empty() for source in sources)))
    for source in empty:
        Logger(f"warning: no row is trained on of {source.why_empty()}")
    return sources


def _default_sampling(args) -> Sampling:
    try:
        return Sampling(ratio=args.sample_ratio, val_ratio=args.val_ratio)
    except ValueError as error:
        raise ValueError(f"--sample_ratio or --val_ratio: {error}") from error


def _mix(sources: Sequence[Source]) -> MixedRows:
    read = [source for source in sources if source.train is not None]
    return MixedRows([source.name for source in read], [source.train for source in read])


def _held_back(args, sources: Sequence[Source], read: partial) -> MixedRows | None:
    """The rows of --val_path and those that are held back of the others, None where nothing asks for any."""
    names = [str(path) for path in args.val_path or []]
    parts = _read(names, read)
    split = [source for source in sources if source.held_back is not None]
    names, parts = names + [source.name for source in split], parts + [source.held_back for source in split]
    if not parts:
        return None
    mixed = MixedRows(names, parts)
    if len(mixed):
        for part in parts[: len(parts) - len(split)]:
            if not len(part):
                Logger(f"warning: no row is validated on of {part.why_empty()}")
        Logger(f"held back: {mixed.summary()}")
        return mixed
    if not split:
        raise ValueError("; ".join(part.why_empty() for part in parts))
    documents = sum(len(source.data.hashes) for source in split)
    raise ValueError(
        f"of {documents:,} documents none that can be used is held back: raise --val_ratio (or val_ratio of "
        "--sampling), or give held-back rows by --val_path"
    )


def _warn_of_leaks(args, sources: Sequence[Source], train: MixedRows, val: MixedRows) -> None:
    """By one val_ratio for all sources no document is on both sides, so that it need not be looked for."""
    ratios = {source.sampling.val_ratio for source in sources if not source.sampling.skips}
    if not args.val_path and len(ratios) == 1:
        return
    found, total = leaks(train, val)
    if found:
        Logger(f"warning: {found:,} of {total:,} held-back documents are also trained on: their loss is too low")


def _digest(args, tokenizer, recipe, sources: Sequence[Source]) -> str:
    """sha256 over all that decides which rows there are and in which order."""
    read = [source for source in sources if source.data is not None]
    # a source that is no file is known by what its documents hold
    content = [source.data.digest or hashlib.sha256(source.data.hashes.tobytes()).hexdigest() for source in read]
    frozen = FrozenTokenizer(tokenizer, recipe.templated)
    what = [repr(recipe), frozen.digest, args.max_seq_len, int(args.packing), args.seed, content]
    return hashlib.sha256(json.dumps([*what, [asdict(source.sampling) for source in read]]).encode()).hexdigest()


def _stream(args, tokenizer, recipe) -> StreamedRows:
    if args.max_steps < 1:
        raise ValueError("--streaming 1 reads without end: say by --max_steps after how many updates the run is over")
    if len(args.data_path) > 1:
        raise ValueError(
            f"--streaming 1 takes one --data_path, and {len(args.data_path)} were given: join the files, or train "
            "from the cache with --streaming 0"
        )
    if args.sampling or args.sample_ratio != 1 or args.val_ratio:
        raise ValueError(
            "--streaming 1 takes every row as it comes: leave out --sampling, --sample_ratio and --val_ratio (hold "
            "rows back by --val_path), or train from the cache with --streaming 0"
        )
    length = args.max_steps * args.accumulation_steps * args.batch_size * get_world_size()
    where = data_source(args.data_path[0])
    stream = StreamedRows(where, tokenizer, recipe, args.max_seq_len, length, args.packing, args.seed, args.on_bad_row)
    stream.stats = [{"dataset": Path(args.data_path[0]).name, "path": where, "digest": None, "streamed": True}]
    return stream
