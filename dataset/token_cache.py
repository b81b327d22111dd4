"""Tokenise once, memory-map ever after: the rows of a file as token ids, kept in a cache folder.

Large files are encoded by one process per CPU, with a progress bar and in flat memory. A cache belongs to one source
file, recipe, tokenizer, chat template and state of the code that encodes (together its key), but to no max_length.

    encoded, tally = tokenise("dataset/sft.jsonl", tokenizer, SFTRecipe("all"), cache_dir="out/cache")
    for encoded in encoded_batches(read_rows("dataset/sft.jsonl"), tokenizer, SFTRecipe("all")):  # a stream, no cache

When a cache is opened its source is compared by size, modification time and sampled blocks (32 of 64 KB, the first and
the last among them). All equal: it is the same. Another size: it changed. Else the digest of the whole file decides.
What this misses: an edit that keeps the size and the time (to the nanosecond) and touches none of the blocks. Delete
the cache folder after such a trick. What it does not look for: damage to the cache's own files that keeps their size.
A template that asks for today's date is rendered with the date of the build.

The files are `{name}-{key}.json`, the record, and `{name}-{key}-{random}.ids` and so on, which it names. The record is
written last, so a build that was interrupted is none. Old keys are left alone: the folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dataset import encode, jsonl
from dataset.encode import Encoded, FrozenTokenizer, PretrainRecipe, SFTRecipe, content_hashes, one_thread
from dataset.jsonl import BadRow, RowReader, RowTally, is_main_process, read_batch, read_rows
from dataset.parallel import map_in_processes
from model import chat

FORMAT = 2
COLUMNS = ("ids", "lengths", "hashes", "spans", "span_counts")
# from about here on, two processes are done earlier than one, although it takes them 0.3 s to start
PARALLEL_BYTES = 4 << 20
MAX_WORKERS = 32  # one process reads for all of them
BATCH_BYTES = 1 << 20
DECODED_BYTES = 4096  # what a row that comes decoded (a list, a table) is taken for
BLOCK, BLOCKS = 1 << 16, 32
PATIENCE = 2.0  # seconds to wait for another process before saying so

Recipe = PretrainRecipe | SFTRecipe


def tokenise(
    path: str | Path, tokenizer, recipe: Recipe, on_bad_row: str = "raise", cache_dir: str | Path | None = None
) -> tuple[Encoded, RowTally]:
    """All rows of `path`, encoded, and what became of them: from the cache if it is valid, else built.

    Args:
        tokenizer: a fast one, of transformers.
        cache_dir: folder of the cache, made where it is missing. None: build in memory. So are sources that are no
            file, such as names on the hub, whatever is said here.

    Raises:
        ValueError, OSError, BadRow: what `dataset.jsonl.read_rows` raises; the file changed during the build; the
            cache cannot be written.
    """
    frozen = FrozenTokenizer(tokenizer, recipe.templated)
    if cache_dir is not None and Path(path).is_file():
        return _Cache(path, frozen, recipe, Path(cache_dir).expanduser()).open(on_bad_row)
    reader = read_rows(path, on_bad_row)
    sinks = {name: io.BytesIO() for name in COLUMNS}
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # each of them builds
    kinds, counts = _encode_into(sinks, reader, frozen, recipe, ranks, quiet=not is_main_process())
    columns = {name: np.frombuffer(sinks[name].getbuffer(), kind) for name, kind in kinds.items()}
    return _whole(Encoded, columns, reader.rows, counts["empty"]), reader


def _whole(kind: type, columns: dict[str, np.ndarray], rows: int, empty: int) -> Encoded:
    if "spans" in columns:
        columns["spans"] = columns["spans"].reshape(-1, 2)
    return kind(**columns, rows=rows, empty=empty)


def _encode_into(
    sinks: dict[str, BinaryIO], reader: RowReader, tokenizer, recipe: Recipe, ranks: int = 1, quiet: bool = False
) -> tuple[dict[str, str], dict[str, int]]:
    """Append every batch to the columns; returns the dtypes of those that the recipe has, and sums."""
    kinds, empty = {}, 0
    workers = worker_count(reader.path, ranks)
    with closing(encoded_batches(reader, tokenizer, recipe, workers)) as batches, _progress(reader, quiet) as advance:
        for batch in batches:
            for name in COLUMNS:
                column = getattr(batch, name)
                if column is not None:
                    kinds[name] = column.dtype.str
                    sinks[name].write(column.data)
            empty += batch.empty
            advance()
    return kinds, {"empty": empty}


@contextmanager
def _progress(reader: RowReader, quiet: bool) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal's stderr if it takes more than two seconds."""
    from tqdm import tqdm  # not wanted by the workers

    looks = {"total": reader.size, "unit": "B", "unit_scale": True} if reader.size else {"unit": " rows"}
    disable = True if quiet else None  # None: not where stderr is a file
    with tqdm(desc=Path(reader.path).name, disable=disable, delay=2, leave=False, **looks) as bar:
        yield lambda: bar.update((reader.position if reader.size else reader.rows) - bar.n)


# --- encoding, here or in processes -----------------------------------------------------------------------------------


def worker_count(path: str | Path, ranks: int = 1) -> int:
    """How many processes should encode a source: 0 where it is no large file, or there is but one CPU for each rank."""
    if not Path(path).is_file() or Path(path).stat().st_size < PARALLEL_BYTES:
        return 0
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    share = min(cpus // max(ranks, 1), MAX_WORKERS)
    return share if share > 1 else 0


def encoded_batches(reader: RowReader, tokenizer, recipe: Recipe, workers: int | None = None) -> Iterator[Encoded]:
    """The rows of `reader`, encoded, batch after batch in the file's order; its counts and its warning are kept.

    Args:
        reader: from `read_rows(path, on_bad_row)`, without `validate`: the recipe validates.
        tokenizer: of transformers, or a `FrozenTokenizer`.
        workers: processes that parse and encode, 0: do it here, None: as `worker_count` says. They never import the
            caller's main script, so that needs no `if __name__ == "__main__"`. Close the generator to end them early.

    Raises:
        BadRow, ValueError, OSError: where and when reading row by row would. ChildProcessError: a process died.
    """
    if not isinstance(tokenizer, FrozenTokenizer):
        tokenizer = FrozenTokenizer(tokenizer, recipe.templated)
    workers = worker_count(reader.path) if workers is None else workers
    job = partial(_encode_batch, recipe, tokenizer, reader.path, not reader.skips)
    batches = _raw_batches(reader)
    with closing(map_in_processes(job, batches, workers) if workers else _map(job, batches)) as results:
        for encoded in results:
            reader.rows += encoded.rows
            for line, reason in encoded.bad:
                reader.reject(line, reason)
            yield encoded
    reader.finish()


def _map(job: Callable, batches: Iterator) -> Iterator:
    """`map` that can be closed."""
    yield from map(job, batches)


def _encode_batch(recipe: Recipe, tokenizer: FrozenTokenizer, path: str, stop_at_bad: bool, rows: list) -> Encoded:
    good, bad = read_batch(rows, recipe.read, stop_at_bad)
    with one_thread():
        encoded = recipe.encode(tokenizer, good, path)
    encoded.bad, encoded.hashes = bad, content_hashes(encoded.ids, encoded.lengths)
    return encoded


def _raw_batches(reader: RowReader) -> Iterator[list[tuple[int, object]]]:
    """Lists of raw rows. Where reading fails, what was read before comes first."""
    batch, size = [], 0
    try:
        for line, raw in reader.raw:
            batch.append((line, raw))
            size += len(raw) if isinstance(raw, bytes) else DECODED_BYTES
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    except (ValueError, OSError):
        if batch:
            yield batch
        raise
    if batch:
        yield batch


# --- the files --------------------------------------------------------------------------------------------------------


class MappedEncoded(Encoded):
    """An `Encoded` whose arrays are files; pickled by their names, so that a DataLoader's workers map them too."""

    where: tuple[Path, dict]

    def __reduce__(self):
        return map_files, self.where


def map_files(folder: Path, record: dict) -> MappedEncoded:
    """The data files that a record names; raises FileNotFoundError, or ValueError for one of another size."""
    columns = {}
    for name, file in record["files"].items():
        path = folder / file["name"]
        if not path.exists():
            raise FileNotFoundError(f"{path} of the token cache is missing: start again, and it is made anew")
        if path.stat().st_size != file["bytes"]:
            raise ValueError(f"{path} of the token cache has {path.stat().st_size:,} bytes, not {file['bytes']:,}")
        kind = np.dtype(file["dtype"])
        # asarray: the plain array over the map, as each slice of a memmap object costs microseconds
        columns[name] = np.asarray(np.memmap(path, kind, "r")) if file["bytes"] else np.empty(0, kind)
    encoded = _whole(MappedEncoded, columns, record["rows"], record["empty"])
    encoded.where = folder, record
    tokens, spans = int(encoded.lengths.sum(dtype=np.int64)), encoded.span_counts
    whole = tokens == len(encoded.ids) and len(encoded.hashes) == len(encoded.lengths)
    if not whole or (spans is not None and int(spans.sum(dtype=np.int64)) != len(encoded.spans)):
        raise ValueError(f"the files {folder / record['name']}-* of the token cache do not belong together")
    return encoded


def source_digest(encoded: Encoded, path: str | Path) -> str | None:
    """sha256 of the file that was encoded, from the cache's record if there is one; None for a name on the hub."""
    if isinstance(encoded, MappedEncoded):
        return encoded.where[1]["source"]["digest"]
    return _digest(Path(path)) if Path(path).is_file() else None


class _Cache:
    """The cache of one source, recipe and tokenizer in a folder."""

    def __init__(self, path: str | Path, tokenizer: FrozenTokenizer, recipe: Recipe, folder: Path):
        self.path, self.source = path, Path(path)
        self.tokenizer, self.recipe, self.folder = tokenizer, recipe, folder
        what = [FORMAT, str(self.source.resolve()), repr(recipe), tokenizer.digest, _code_digest()]
        key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:20]
        self.name = f"{self.source.name.split('.')[0][:60]}-{key}"
        self.record_path = folder / f"{self.name}.json"

    def open(self, on_bad_row: str) -> tuple[Encoded, RowTally]:
        """What the cache holds, after building it where it does not hold it."""
        tally = RowTally(self.path, on_bad_row)
        found, _ = self.check(thorough=False)
        if found is None:
            with self._lock():
                found, reason = self.check(thorough=True)  # another process may have built it meanwhile
                if found is None:
                    if reason:
                        print(f"{self.path}: tokenised again, because {reason}", file=sys.stderr)
                    return self.build(on_bad_row)
        record = found.where[1]
        for line, reason in record["first_bad"]:
            if not tally.skips:
                raise BadRow(tally.path, line, reason)
            tally.first_bad = BadRow(tally.path, line, reason)
        tally.rows, tally.skipped = record["rows"], Counter(record["skipped"])
        tally.skipped_lines = record["skipped_lines"]
        tally.finish()
        return found, tally

    def check(self, thorough: bool) -> tuple[MappedEncoded | None, str]:
        """The cache if it is valid, else why not, "" if there is none. Reads the whole source only if `thorough`."""
        try:
            record = json.loads(self.record_path.read_text(encoding="utf-8"))
            if record["name"] != self.name or record["format"] != FORMAT:
                return None, "the cache's record is of another cache"
            found = map_files(self.folder, record)
            was = [record["source"][part] for part in ("size", "mtime_ns", "sampled", "digest")]
        except (FileNotFoundError, NotADirectoryError):
            return None, "a file of the cache is missing" if self.record_path.exists() else ""
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return None, f"the cache is damaged ({error})"
        now = self._look()
        if [now["size"], now["mtime_ns"], now["sampled"]] == was[:3]:
            return found, ""
        if thorough and now["size"] == was[0] and _digest(self.source) == was[3]:
            with suppress(OSError):  # noted for the next time, if that is possible
                self._write_record(record | {"source": now | {"digest": was[3]}})
            return found, ""
        return None, "the file changed since it was tokenised"

    def build(self, on_bad_row: str) -> tuple[Encoded, RowTally]:
        """Encode the source into new files and make them the cache. Nothing is left of a build that fails."""
        reader = read_rows(self.path, on_bad_row)
        self._sweep(self._named_files())
        before, start = self._look(), f"{self.name}-{secrets.token_hex(4)}"
        paths = {name: self.folder / f"{start}.{name}" for name in COLUMNS}
        try:
            kinds, counts = self._write_columns(paths, reader)
            digest = _digest(self.source)
            if self._look() != before:
                raise ValueError(f"{self.path} changed while it was being tokenised: start again when it is complete")
            record = self._record(before | {"digest": digest}, {n: paths[n] for n in kinds}, kinds, counts, reader)
            with _writing(self.folder):
                self._write_record(record)
        finally:  # whatever happened: what the record does not name goes
            self._sweep(self._named_files())
        return map_files(self.folder, record), reader

    def _write_columns(self, paths: dict[str, Path], reader: RowReader) -> tuple[dict[str, str], dict[str, int]]:
        with ExitStack() as stack:
            sinks = {name: stack.enter_context(_Sink(path)) for name, path in paths.items()}
            return _encode_into(sinks, reader, self.tokenizer, self.recipe)

    def _record(self, source: dict, paths: dict[str, Path], kinds: dict[str, str], counts: dict, tally: RowTally):
        return {
            "format": FORMAT,
            "name": self.name,
            "path": str(self.source.resolve()),
            "recipe": repr(self.recipe),
            "source": source,
            "files": {
                name: {"name": path.name, "bytes": path.stat().st_size, "dtype": kinds[name]}
                for name, path in paths.items()
            },
            "rows": tally.rows,
            **counts,
            "skipped": tally.skipped,
            "skipped_lines": tally.skipped_lines,
            "first_bad": [[tally.first_bad.line, tally.first_bad.reason]] if tally.first_bad else [],
        }

    def _write_record(self, record: dict) -> None:
        temporary = self.folder / f"{self.name}-{secrets.token_hex(4)}.record"
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.record_path)

    def _look(self) -> dict:
        """What is compared of the source each time."""
        status = self.source.stat()
        return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sampled": _sampled_digest(self.source)}

    def _named_files(self) -> set[str]:
        """Names of the data files of the record that is there."""
        try:
            record = json.loads(self.record_path.read_text(encoding="utf-8"))
            return {file["name"] for file in record["files"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return set()

    def _sweep(self, kept: set[str]) -> None:
        """Remove files of earlier builds; what another process has mapped stays on Windows, until the next time."""
        for path in self.folder.glob(f"*-{self.name.rsplit('-', 1)[1]}-*"):  # a stem may hold characters of glob
            if path.name not in kept:
                with suppress(OSError):
                    path.unlink()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One builder at a time; the system frees the lock of one that died."""
        from filelock import FileLock, Timeout  # not wanted by the workers

        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f"{self.name}.lock")
            try:
                lock.acquire(timeout=PATIENCE, poll_interval=0.1)
            except Timeout:
                if is_main_process():
                    print(f"waiting for another process that tokenises {self.path}", file=sys.stderr)
                lock.acquire(poll_interval=0.1)
        try:
            yield
        finally:
            lock.release()


class _Sink:
    """A data file that is being written; complete and on the disk when it is left without an error."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> _Sink:
        with _writing(self.path.parent):
            self.file = self.path.open("wb")
        return self

    def write(self, data: memoryview) -> None:
        with _writing(self.path.parent):
            self.file.write(data)

    def __exit__(self, kind: type | None, *_) -> None:
        try:
            with _writing(self.path.parent):
                if kind is None:
                    self.file.flush()
                    os.fsync(self.file.fileno())
                self.file.close()
        except OSError:
            if kind is None:  # else the first error is the one to show
                raise


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn what goes wrong with the cache's files into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # said already
            raise
        raise type(error)(
            f"the token cache in {folder} cannot be written ({error.strerror}): free space or make it writable, or "
            "name another folder with --cache_dir (none: no cache, every start tokenises anew)"
        ) from error


def _code_digest() -> str:
    """sha256 over the code that makes ids of rows: a change of it is a change of the cache's key."""
    digest = hashlib.sha256()
    for module in (jsonl, encode, chat):
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sampled_digest(path: Path) -> str:
    """sha256 over BLOCKS evenly spaced blocks, the first and the last among them: over all of a file below 2 MB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        last = max(file.seek(0, os.SEEK_END) - BLOCK, 0)
        for i in range(BLOCKS):
            file.seek(last * i // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()
