"""What rows of training data are: true lengths, trained tokens, turns, code, language, equal and nearly equal rows.

Pure functions and one job for processes, shared by the scripts that check, audit and clean data. The job keeps some
60 bytes of a row (256 more where near duplicates are looked for), never its text: a million rows fit anywhere.

    inspection = Inspection("sft", FrozenTokenizer(tokenizer), max_lens=(340, 512))
    for facts in inspect_rows(read_rows("a.jsonl", "skip").raw, inspection, workers=2):
        print(facts.columns["length"], facts.reports[340]["cut"], facts.bad)
    first = first_equal(hashes)                      # the row that each one repeats, or itself
    spans = reply_spans(tokenizer, messages)         # where replies are, without a look at the training mask
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from dataset.encode import Encoded, FrozenTokenizer, SFTRecipe, cut_rows, encode_documents, one_thread, splitmix64
from dataset.jsonl import pretrain_text, to_object, trainable_messages
from dataset.parallel import map_in_processes
from model.chat import render

CONVERSATION_KEYS = ("conversations", "messages", "output")
NEEDS_DATASKETCH = "near duplicates need datasketch: pip install -r requirements-data.txt"
BATCH_BYTES = 1 << 20
DECODED_BYTES = 4096  # what a row that comes decoded (a list, a table) is taken for
SHINGLE = 5  # characters
PERMUTATIONS, BANDS = 128, 16
LANGUAGES = ("zh", "en", "other")

# on lower-case text; [ \t] and not \s, which would search through every run of blank lines again and again
CODE = re.compile(
    r"```"
    r"|\bdef[ \t]+\w+[ \t]*\("
    r"|^[ \t]*class[ \t]+\w+[ \t]*(\([^)\n]*\))?[ \t]*[:{]"
    r"|^[ \t]*import[ \t]+[\w.]+([ \t]+as[ \t]+\w+)?([ \t]*,[ \t]*[\w.]+)*[ \t]*;?[ \t]*$"
    r"|^[ \t]*from[ \t]+[\w.]+[ \t]+import\b"
    r"|public static void main"
    r"|\#include[ \t]*[<\"]"
    r"|\bfunction[ \t]*\w*[ \t]*\([^)\n]*\)[ \t]*\{"
    r"|\bconsole\.log[ \t]*\("
    r"|\bprint[ \t]*\([\"'\w]"
    r"|\b(let|const|var)[ \t]+\w+[ \t]*="
    r"|^[ \t]*for[ \t]+\w+[ \t]+in[ \t][^\n]{1,200}:[ \t]*$"
    r"|^[ \t]*select[ \t][^\n]{1,200}\bfrom\b"
    r"|</(html|body|head|div|span|script|table|form|ul)>",
    re.MULTILINE,
)
HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
LATIN_WORD = re.compile("[a-z\u00df-\u00f6\u00f8-\u024f]+")
LETTER = re.compile(r"[^\W\d_]")
UNIT = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W\u3400-\u9fff\uf900-\ufaff_]+")
# what of a row of an evaluation file must not be trained on; a system prompt or a test may be common to many rows
EVALUATED_KEYS = ("prompt", "question", "query", "problem", "text", "instruction", "input", "canonical_solution") + (
    *("solution", "reference", "code", "output", "answer"),
)


# --- texts ------------------------------------------------------------------------------------------------------------


def is_code(text: str) -> bool:
    """Whether a text looks like it holds program code: a fence, or a line that few sentences look like."""
    return CODE.search(text.lower()) is not None


def language_of(text: str) -> str:
    """ "zh", "en" or "other", by script: which is most, Han characters, words in Latin letters, or other letters."""
    text = text.lower()
    han, words = len(HAN.findall(text)), LATIN_WORD.findall(text)
    other = len(LETTER.findall(text)) - han - sum(map(len, words))
    counts = (han, len(words), other)
    return LANGUAGES[counts.index(max(counts))] if any(counts) else "other"


def texts_of(row: dict | list[dict] | str) -> list[str]:
    """What the messages of a conversation say, thoughts included, or the text itself."""
    return [row] if isinstance(row, str) else [said(message) for message in row]


def said(message: dict) -> str:
    """The text of a message, behind its thoughts if there are any."""
    return "\n".join(filter(None, (message.get("reasoning_content"), message["content"])))


def content_digest(row: list[dict] | str) -> int:
    """64 bits that are the same for rows of the same messages (or text), in whatever format they were written."""
    content = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")


def stage_of(row: dict) -> str:
    """ "sft" for a row with messages or an output, else "pretrain"."""
    return "sft" if any(key in row for key in CONVERSATION_KEYS) else "pretrain"


# --- equal and nearly equal rows --------------------------------------------------------------------------------------


def first_equal(hashes: np.ndarray) -> np.ndarray:
    """For each row the first one of the same hash, itself where it is the first: int64 [D]."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse]


class Signer:
    """MinHash signatures (Broder 1997, by datasketch) of the sets of 5-character pieces of texts.

    Kept of a signature: 16 digests of 8 values each, of which two rows share one with a chance of 1 - (1 - J^8)^16 at
    similarity J (0.95 at 0.8, 0.24 at 0.6), and the lowest byte of each value, by which J is estimated to about
    +-0.035 (b-bit minwise hashing, https://arxiv.org/abs/0910.3349).

    Raises:
        ValueError: datasketch is not installed.
    """

    def __init__(self):
        try:
            from datasketch import MinHash  # optional
        except ImportError as error:
            raise ValueError(NEEDS_DATASKETCH) from error
        self._minhash = MinHash(PERMUTATIONS, seed=1, scheme="affine32", hashfunc=int)
        self._weights = splitmix64(np.arange(PERMUTATIONS // BANDS, dtype=np.uint64)) | np.uint64(1)

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Digests uint64 [16] and bytes uint8 [128] of what the texts say, spaces and case apart."""
        text = " ".join(" ".join(texts).lower().split())
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)
        self._minhash.clear()
        self._minhash.update_batch((rolling(points, SHINGLE) >> np.uint64(32)).tolist())
        values = self._minhash.hashvalues.astype(np.uint64)
        digests = splitmix64((values.reshape(BANDS, -1) * self._weights).sum(axis=1))
        return digests, values.astype(np.uint8)


def rolling(values: np.ndarray, size: int) -> np.ndarray:
    """A hash of every `size` values in a row, each once: uint64; of all of them where they are fewer."""
    size = max(min(size, len(values)), 1)
    weights = splitmix64(np.arange(size, dtype=np.uint64)) | np.uint64(1)
    sums = np.zeros(max(len(values) - size + 1, 1), np.uint64)
    for k in range(min(size, len(values))):
        sums += (values[k : len(values) - size + 1 + k] + np.uint64(1)) * weights[k]
    return np.unique(splitmix64(sums))


def first_similar(digests: np.ndarray, signatures: np.ndarray, threshold: float) -> np.ndarray:
    """For each row an earlier one that is similar, itself where none was found: int64 [D].

    Rows that share a digest are compared with the first of them and the one before, so the time grows like a sort.

    Args:
        digests, signatures: of `Signer`, [D, 16] and [D, 128]. threshold: the least estimated similarity.
    """
    found = np.arange(len(digests))
    for digest in digests.T:
        order = np.argsort(digest, kind="stable")  # earlier rows first
        starts = np.append(True, digest[order][1:] != digest[order][:-1])[: len(order)]
        heads = np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))
        later = np.flatnonzero(~starts)
        for earlier in (heads[later], later - 1):
            for at in range(0, len(later), 1 << 16):  # in parts: all at once would take gigabytes
                row, other = order[later[at : at + (1 << 16)]], order[earlier[at : at + (1 << 16)]]
                similar = estimated_similarity(signatures[row], signatures[other]) >= threshold
                found[row[similar]] = np.minimum(found[row[similar]], other[similar])
    return found


def estimated_similarity(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Jaccard similarity from one-byte signatures uint8 [..., 128]: equal bytes, less those equal by chance."""
    equal = (one == other).mean(axis=-1)
    return (equal - 1 / 256) / (1 - 1 / 256)


# --- overlap with an evaluation file ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlap:
    """The n-grams of evaluation texts: words, or single Han characters, without case and punctuation.

    A training message overlaps if it holds `size` units in a row that an evaluation text holds; an evaluation text
    of fewer units must be the whole of a message.
    """

    size: int
    grams: np.ndarray  # sorted uint64
    wholes: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[str], size: int) -> Overlap:
        grams, wholes = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
        for text in texts:
            units = units_of(text)
            if len(units):
                (grams if len(units) >= size else wholes).append(rolling(units, size))
        return cls(size, np.unique(np.concatenate(grams)), np.unique(np.concatenate(wholes)))

    def holds(self, texts: Iterable[str]) -> bool:
        """Whether one of the texts of a training row overlaps."""
        for text in texts:
            units = units_of(text)
            known = self.grams if len(units) >= self.size else self.wholes
            if len(units) and np.isin(rolling(units, self.size), known).any():
                return True
        return False


def units_of(text: str) -> np.ndarray:
    """A number for each word or Han character: uint64 [N]."""
    return np.array([zlib.crc32(unit.encode()) for unit in UNIT.findall(text.lower())], np.uint64)


def evaluated_texts(row: dict) -> list[str]:
    """What of a row of an evaluation file must not be trained on.

    Raises:
        ValueError: the row has no text of a known name.
    """
    if any(isinstance(row.get(key), list) for key in CONVERSATION_KEYS[:2]):
        return _compared(trainable_messages(row))
    texts = [row[key] for key in EVALUATED_KEYS if isinstance(row.get(key), str) and row[key].strip()]
    if not texts:
        found = ", ".join(map(str, row)) or "none"
        raise ValueError(f"missing key: wanted one of {', '.join(EVALUATED_KEYS)}, found {found}; rename or add it")
    return texts


# --- repairs ----------------------------------------------------------------------------------------------------------


def repaired(raw: object) -> tuple[dict, list[str]]:
    """The object of a raw row after the repairs that lose nothing, and what was repaired.

    A byte order mark, white space behind a text, a system message that says nothing. Raises ValueError if it is none.
    """
    done = []
    if isinstance(raw, bytes) and raw.startswith(codecs.BOM_UTF8):
        raw, done = raw[len(codecs.BOM_UTF8) :], ["byte order mark"]
    row = to_object(raw)
    changed = dict(row)
    for key in ("conversations", "messages"):
        if isinstance(row.get(key), list):
            changed[key] = _repaired_turns(row[key], done)
    for key in ("text", "content", "input", "output", "instruction"):
        if isinstance(row.get(key), str):
            changed[key] = _without_end_space(row[key], done)
    return changed, list(dict.fromkeys(done))


def _repaired_turns(turns: list, done: list[str]) -> list:
    result = []
    for number, turn in enumerate(turns):
        if isinstance(turn, dict) and _says_nothing(turn, number):
            done.append("empty system message")
            continue
        if isinstance(turn, dict):
            texts = {key: turn[key] for key in ("content", "value") if isinstance(turn.get(key), str)}
            turn = turn | {key: _without_end_space(text, done) for key, text in texts.items()}
        result.append(turn)
    return result


def _says_nothing(turn: dict, number: int) -> bool:
    text = turn.get("content", turn.get("value"))
    role = turn.get("role", turn.get("from"))
    listed = turn.get("tools") or turn.get("functions")
    return number == 0 and role == "system" and not listed and (text is None or text == "" or str(text).isspace())


def _without_end_space(text: str, done: list[str]) -> str:
    stripped = text.rstrip()
    if stripped == text or not stripped:  # what is blank is not repaired but refused
        return text
    done.append("white space at the end")
    return stripped


# --- the job ----------------------------------------------------------------------------------------------------------


@dataclass
class Facts:
    """What is known of the rows of a batch.

    rows: raw ones. columns: of the G good rows, int64 or as said: position (in the batch), line, hash uint64; turns
    (replies of the assistant), code bool, python bool, language (index of LANGUAGES), system bool; with a tokenizer
    length (tokens, not cut) and trained (within the first of max_lens); digests and signatures of `Signer`; overlap
    bool. reports: for each of max_lens the counts of `dataset.encode.cut_rows`. bad: (position, line, reason).
    repaired: (line, what).
    """

    rows: int = 0
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    reports: dict[int, Counter] = field(default_factory=dict)
    bad: list[tuple[int, int, str]] = field(default_factory=list)
    repaired: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Inspection:
    """The job of `inspect_rows`: a batch of raw rows becomes `Facts`.

    stage: "sft" or "pretrain". tokenizer: None leaves the lengths out. near: make signatures. repair: look at rows as
    `repaired` leaves them. overlap: mark rows that overlap with it.
    """

    stage: str
    tokenizer: FrozenTokenizer | None = None
    max_lens: tuple[int, ...] = ()
    near: bool = False
    repair: bool = False
    overlap: Overlap | None = None

    def read(self, row: dict) -> list[dict] | str:
        """A checked row: its messages or its text; raises ValueError."""
        return trainable_messages(row) if self.stage == "sft" else pretrain_text(row)

    def __call__(self, rows: list[tuple[int, object]]) -> Facts:
        facts, good = Facts(rows=len(rows)), []
        for position, (line, raw) in enumerate(rows):
            try:
                row, done = repaired(raw) if self.repair else (to_object(raw), [])
                good.append((position, line, self.read(row)))
                facts.repaired += [(line, what) for what in done]
            except ValueError as error:
                facts.bad.append((position, line, str(error)))
        self._encode(good, facts)  # before the columns, as it leaves out what the template refuses
        self._describe(good, facts)
        return facts

    def _describe(self, good: list[tuple[int, int, list[dict] | str]], facts: Facts) -> None:
        positions, lines, rows = zip(*good, strict=True) if good else ((), (), ())
        texts = [texts_of(row) for row in rows]
        joined = ["\n".join(parts) for parts in texts]
        facts.columns |= {
            "position": np.array(positions, np.int64),
            "line": np.array(lines, np.int64),
            "hash": np.array([content_digest(row) for row in rows], np.uint64),
            "turns": np.array([sum(_role(m) == "assistant" for m in row) for row in rows], np.int64),
            "system": np.array([_role(row[0]) == "system" for row in rows], bool),
            "code": np.array([is_code(text) for text in joined], bool),
            "python": np.array(["python" in text.lower() for text in joined], bool),
            "language": np.array([LANGUAGES.index(language_of(text)) for text in joined], np.uint8),
        }
        if self.near:
            signer = Signer()
            signed = [signer(parts) for parts in texts]
            facts.columns["digests"] = np.array([pair[0] for pair in signed], np.uint64).reshape(-1, BANDS)
            facts.columns["signatures"] = np.array([pair[1] for pair in signed], np.uint8).reshape(-1, PERMUTATIONS)
        if self.overlap is not None:
            found = [self.overlap.holds(_compared(row)) for row in rows]
            facts.columns["overlap"] = np.array(found, bool)

    def _encode(self, good: list[tuple[int, int, list[dict] | str]], facts: Facts) -> None:
        """Lengths, and what is left of the rows at each of max_lens."""
        if self.tokenizer is None:
            return
        with one_thread():
            if self.stage == "pretrain":
                encoded = encode_documents(self.tokenizer, [text for _, _, text in good])
            else:
                encoded = encode_good(self.tokenizer, good, facts.bad)
        facts.columns["length"] = encoded.lengths.astype(np.int64)
        if self.stage == "sft" and self.max_lens:
            facts.reports = {max_len: Counter(cut_rows(encoded, max_len).report) for max_len in self.max_lens}
            facts.columns["trained"] = trained_tokens(encoded, self.max_lens[0])


def _role(message: dict | str) -> str:
    return message["role"] if isinstance(message, dict) else ""


def _compared(row: list[dict] | str) -> list[str]:
    """The texts of a training row that could give an evaluation away."""
    return [row] if isinstance(row, str) else [said(m) for m in row if m["role"] in ("user", "assistant")]


def encode_good(
    tokenizer: FrozenTokenizer,
    good: list[tuple[int, int, list[dict]]],
    bad: list[tuple[int, int, str]],
) -> Encoded:
    """Conversations as training encodes them; those that the chat template refuses move from `good` to `bad`."""
    recipe = SFTRecipe()

    def encode(rows) -> Encoded:
        # the recipe takes the tools off the messages, which are looked at again
        return recipe.encode(tokenizer, [(line, [dict(m) for m in messages]) for _, line, messages in rows], "")

    try:
        return encode(good)
    except ValueError:
        for row in list(good):
            try:
                encode([row])
            except ValueError as error:
                good.remove(row)
                bad.append((row[0], row[1], f"refused by the template{str(error).removeprefix(f':{row[1]}')}"))
        return encode(good)


def trained_tokens(encoded: Encoded, max_len: int) -> np.ndarray:
    """Labelled tokens of each conversation within its first max_len tokens, int64 [D]: the first has no label."""
    limit = np.repeat(np.minimum(encoded.lengths, max_len), encoded.span_counts)
    begin, end = encoded.spans.T.astype(np.int64)
    totals = np.cumsum(np.append(0, np.clip(end, 1, limit) - np.clip(begin, 1, limit)))
    last = np.cumsum(encoded.span_counts, dtype=np.int64)
    return totals[last] - totals[last - encoded.span_counts]


def batches_of(rows: Iterable[tuple[int, object]]) -> Iterator[list[tuple[int, object]]]:
    """Lists of raw rows of about a megabyte."""
    batch, size = [], 0
    for line, raw in rows:
        batch.append((line, raw))
        size += len(raw) if isinstance(raw, bytes) else DECODED_BYTES
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def inspect_rows(rows: Iterable[tuple[int, object]], inspection: Inspection, workers: int) -> Iterator[Facts]:
    """`Facts` of batch after batch, in order; by processes if workers > 0. Close it to end them early.

    Args:
        rows: `raw` of a reader of `dataset.jsonl.read_rows`.

    Raises:
        ValueError, OSError: what reading raises, and Signer. ChildProcessError: a process died.
    """
    batches = batches_of(rows)
    mapped: Callable = map_in_processes if workers else _map_here
    with closing(mapped(inspection, batches, workers)) as results:
        yield from results


def _map_here(job: Callable, batches: Iterator, count: int) -> Iterator:
    yield from map(job, batches)


def joined_columns(parts: Sequence[Facts]) -> dict[str, np.ndarray]:
    """The columns of many batches end to end, `position` counted from the first row of the first batch.

    They are taken out of the parts, lest all of them are in memory twice.
    """
    offset = 0
    for part in parts:
        part.columns["position"] += offset
        offset += part.rows
    names = list(parts[0].columns)
    return {name: np.concatenate([part.columns.pop(name) for part in parts]) for name in names}


# --- replies, found without the mask ----------------------------------------------------------------------------------


def reply_spans(tokenizer, messages: list[dict], stop: int | None = None) -> list[tuple[int, int]]:
    """Where in a rendered conversation the replies are, each from behind its header up to and with its end marker.

    Found by rendering the conversation up to each reply and up to its end, as a prompt of inference would be: the mask
    and the template's generation tags, which decide what is trained, are not looked at.

    Args:
        stop: replies that begin at this token or later are left out.

    Raises:
        ValueError: the template writes the beginning of the conversation otherwise than the whole of it.
    """
    tools = list(chain.from_iterable(message.get("tools", []) for message in messages)) or None
    messages = [{key: value for key, value in message.items() if key != "tools"} for message in messages]
    whole = render(tokenizer, messages, tools).input_ids
    hello = [{"role": "user", "content": "?"}]
    asked = render(tokenizer, hello, add_generation_prompt=True).input_ids
    header = asked[len(render(tokenizer, hello).input_ids) :]
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(tokenizer, messages[:number], tools).input_ids if number else []
        if stop is not None and len(prompt) + len(header) >= stop:
            break
        so_far = render(tokenizer, messages[: number + 1], tools).input_ids
        if whole[: len(prompt) + len(header)] != prompt + header or whole[: len(so_far)] != so_far:
            raise ValueError(
                f"the chat template writes message {number + 1} otherwise once more messages follow: which tokens are "
                "its reply cannot be told; use the shipped model/chat_template.jinja"
            )
        end = len(so_far) - so_far[::-1].index(tokenizer.eos_token_id)
        spans.append((len(prompt) + len(header), end))
    return spans


# --- files ------------------------------------------------------------------------------------------------------------


def refuse_taken(path: Path, inputs: Iterable[str | Path], force: bool, flag: str) -> None:
    """Raise an error if a file to write is a folder, one of the inputs, or, without `force`, there already."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file to write with {flag}")
    for source in inputs:
        if path.exists() and Path(source).exists() and path.samefile(source):
            raise ValueError(f"{flag} {path} is the input {source}, which would be lost: choose another name")
    if path.exists() and not force:
        raise FileExistsError(f"{path} is there already: choose another name for {flag}, or write over it with --force")
