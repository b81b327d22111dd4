"""Which rows are trained on in which order: the same for any number of processes, and again after a resume."""

from __future__ import annotations

import math

import torch
from torch.utils.data import DataLoader, IterableDataset

from trainer.stopping import leave_signals_alone
from trainer.trainer_utils import SkipBatchSampler, StreamShare, get_rank, get_world_size


class DataOrder:
    """The batches of an epoch on this process.

    Args:
        args: --batch_size, --num_workers, --seed, --device. dataset: as `TrainRun` takes it.
        rows_per_update: of all processes together.

    Attributes:
        batches: of an epoch; updates: of an epoch; batches_per_update: but the last one of an epoch may have fewer.
    """

    def __init__(self, args, dataset, rows_per_update: int):
        self.args, self.dataset, self.rows_per_update = args, dataset, rows_per_update
        self.is_stream = isinstance(dataset, IterableDataset)
        sampler = self._sampler(range(len(dataset)))
        self.batches, self.batches_per_update = len(sampler), sampler.batches_per_update
        self.updates = math.ceil(len(dataset) / rows_per_update)

    def _sampler(self, order, skip: int = 0) -> SkipBatchSampler:
        batch_size = self.args.batch_size
        return SkipBatchSampler(order, batch_size, skip, get_rank(), get_world_size(), self.rows_per_update)

    def sampler(self, epoch: int, updates_done: int) -> SkipBatchSampler:
        """That of an epoch, from its first update that was not made before; the dataset is dealt anew for it."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        order = range(len(self.dataset))
        if not self.is_stream:
            generator = torch.Generator().manual_seed(self.args.seed + epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        return self._sampler(order, updates_done * self.batches_per_update)

    def last_batch(self, step: int) -> int:
        """The number of the batch that closes update `step`; batches count from 0, updates from 1."""
        return min(step * self.batches_per_update, self.batches) - 1

    def load(self, sampler: SkipBatchSampler, collate):
        """(number, batch) of all batches that the sampler does not skip."""
        yield from enumerate(make_loader(self.args, self.dataset, sampler, collate), start=sampler.skip_batches)


def make_loader(args, dataset, sampler: SkipBatchSampler, collate) -> DataLoader:
    on_cuda = torch.device(args.device).type == "cuda"
    workers = args.num_workers if args.num_workers >= 0 else 2 * on_cuda
    how = {"batch_sampler": sampler, "num_workers": workers}
    if isinstance(dataset, IterableDataset):  # one process reads it: several would each read it
        dataset, how = StreamShare(dataset, sampler), {"batch_size": None, "num_workers": min(workers, 1)}
    return DataLoader(
        dataset,
        collate_fn=collate,
        pin_memory=on_cuda,
        generator=torch.Generator(),  # of its own: it would otherwise draw from the model's random stream
        worker_init_fn=leave_signals_alone,
        **how,
    )


class KeepRows:
    """A collator that hands on the rows too, so that a batch can be cut into smaller ones."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, rows):
        return rows, self.collate(rows)


def to_device(batch, device):
    """Move the tensors of a (nested) batch to the device; leave strings alone."""
    if isinstance(batch, torch.Tensor):
        # from pinned memory only: elsewhere the copy could be read before it is done
        return batch.to(device, non_blocking=batch.is_pinned())
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [to_device(value, device) for value in batch]
    return batch
