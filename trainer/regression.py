"""What a model says while it is trained: greedy samples, and prompts whose right answers are known.

Called by the stage after each validation. The model and the random state are left as they were found, so a run learns
the same with and without; the files are read once, before the first step. A regression row has an "id", a "prompt",
"expect_substrings" or a "checker", and where wanted "system" and "max_new_tokens". A checker names one or more of
substrings, regex and python (asserts about the code in the reply, run in the sandbox), and all must agree:

    {"id": "france", "prompt": "What is the capital of France?", "expect_substrings": ["Paris"]}
    {"id": "week", "prompt": "How many days has a week?", "expect_substrings": [["seven", "7"]], "max_new_tokens": 40}
    {"id": "twice", "prompt": "Write a Python function twice(x).", "checker": {"python": "assert twice(3) == 6"}}
"""

from __future__ import annotations

import ast
import functools
import json
import re
import sys
import time
import unicodedata
from contextlib import contextmanager
from pathlib import Path

import torch

from dataset.jsonl import BadRow, check_text, read_rows
from model.chat import encode_text, render
from model.generation import reply
from model.sandbox import judge_code
from model.weights import atomic_write, write_json
from trainer.arguments import input_path
from trainer.trainer_utils import Logger, is_main_process, unwrap

SAMPLE_TOKENS = 48
ANSWER_TOKENS = 128  # of a row that does not say
COLUMNS, PROMPT_COLUMNS = 120, 40  # of a printed sample, and of the prompt in it
REGEX_CHARS = 4000  # of a reply that a pattern is tried on
NAMED = 8  # ids in a printed line

# --- checkers ---------------------------------------------------------------------------------------------------------


def _check_substrings(wanted: object) -> None:
    if not isinstance(wanted, list) or not wanted:
        raise ValueError('wrong type: the expected substrings are no list with something in it; write ["text", ...]')
    for entry in wanted:
        for text in entry if isinstance(entry, list) and entry else [entry]:
            check_text(text, "an expected substring")


def _check_regex(wanted: object) -> None:
    try:
        re.compile(check_text(wanted, "the regex"))
    except re.error as error:
        raise ValueError(f"broken regex: {error}; repair it") from error


def _check_python(wanted: object) -> None:
    try:
        ast.parse(check_text(wanted, "the python check"))
    except SyntaxError as error:
        raise ValueError(f"broken Python: {error.msg} in line {error.lineno} of the check; repair it") from error


def why_missing(text: str, wanted: list) -> str:
    """Which expected substrings a reply lacks, "" if none; an entry that is a list needs one of its alternatives.

    Upper and lower case are alike.
    """
    entries = [entry if isinstance(entry, list) else [entry] for entry in wanted]
    lacking = [words for words in entries if not any(word.lower() in text.lower() for word in words)]
    return f"lacks {', '.join(' or '.join(words) for words in lacking)}" if lacking else ""


def _why_no_match(text: str, pattern: str) -> str:
    # the time of a search may grow fast with the length, and a model that repeats itself writes long replies
    return "" if re.search(pattern, text[:REGEX_CHARS]) else f"does not match {pattern}"


def _why_wrong_code(text: str, check: str) -> str:
    return judge_code(text, check)["error"]


# kind -> (raises ValueError if it cannot be checked for, says why a reply is wrong or "")
CHECKERS = {
    "substrings": (_check_substrings, why_missing),
    "regex": (_check_regex, _why_no_match),
    "python": (_check_python, _why_wrong_code),
}


def judge(text: str, case: dict) -> dict:
    """{"passed", "why"}: whether a reply holds what its row expects; why not, "" if it does."""
    reasons = [CHECKERS[kind][1](text, wanted) for kind, wanted in _checks(case).items()]
    why = "; ".join(reason for reason in reasons if reason)
    return {"passed": not why, "why": why}


# --- the prompt files -------------------------------------------------------------------------------------------------


def read_prompts(path: str | Path) -> list[dict]:
    """Rows {"prompt"} and, where wanted, "system".

    Raises:
        OSError, ValueError: no such file; a row that is no such row, as `path:line: reason`.
    """
    return [row for _, row in read_rows(input_path(path), validate=_check_prompt)]


def read_cases(path: str | Path) -> list[dict]:
    """The rows of a file of regression prompts, as the module's docstring has them.

    Raises:
        OSError, ValueError: no such file; a row that cannot be asked or judged, or an id that occurs twice, as
            `path:line: reason`.
    """
    rows, lines = read_rows(input_path(path), validate=_check_case), {}
    cases = []
    for line, row in rows:
        if row["id"] in lines:
            first = lines[row["id"]]
            raise BadRow(rows.path, line, f"doubled id: {row['id']!r} is that of line {first} too; give it another")
        lines[row["id"]] = line
        cases.append(row)
    return cases


def _check_prompt(row: dict, needed=("prompt",), known=("system",)) -> None:
    for name in row:
        if name not in (*needed, *known):
            raise ValueError(f"unknown key: {name!r}; rename or remove it, known are {', '.join((*needed, *known))}")
    for name in needed:
        if name not in row:
            raise ValueError(f"missing key: no {name!r} among {', '.join(row) or 'none'}; add it")
    for name in (*needed, "system"):
        if name in row:
            check_text(row[name], f"'{name}'")


def _check_case(row: dict) -> None:
    _check_prompt(row, ("id", "prompt"), ("expect_substrings", "checker", "system", "max_new_tokens"))
    tokens = row.get("max_new_tokens", 1)
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"wrong type: 'max_new_tokens' is {tokens!r}; write a whole number above 0")
    if not isinstance(row.get("checker", {}), dict):
        raise ValueError('wrong type: \'checker\' is no object; write {"regex": "..."} or {"python": "..."}')
    checks = _checks(row)
    if not checks:
        raise ValueError("missing key: neither 'expect_substrings' nor 'checker'; say what a right reply is")
    for kind, wanted in checks.items():
        if kind not in CHECKERS:
            raise ValueError(f"unknown checker: {kind!r}; use {', '.join(CHECKERS)}")
        CHECKERS[kind][0](wanted)


def _checks(case: dict) -> dict:
    """Kind -> what is wanted, of both ways to write it."""
    checks = dict(case.get("checker", {}))
    if "expect_substrings" in case:
        if "substrings" in checks:
            raise ValueError("doubled key: 'expect_substrings' and a checker 'substrings'; put them together")
        checks["substrings"] = case["expect_substrings"]
    return checks


@functools.cache
def _remembered(read, path: str) -> list[dict]:
    """A prompt file as it was at the start: changed or removed later, it neither stops a training nor counts."""
    return read(path)


def check_prompt_files(args) -> None:
    """Read the prompt files that a run will use, at its start and once for the whole of it.

    Raises:
        OSError, ValueError: a file is missing or broken.
    """
    _remembered.cache_clear()
    if args.sample_prompts != "none":
        _remembered(read_prompts, str(args.sample_prompts))
    if args.regression_eval:
        _remembered(read_cases, str(args.regression_prompts))


# --- asking -----------------------------------------------------------------------------------------------------------


@contextmanager
def answering(model):
    """Eval mode and eager code inside; afterwards modes, random state and torch.compile's stance are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    # every length of a growing cache would be compiled for by itself
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        try:
            yield model.eval()
        finally:
            for module, training in modes:  # one by one: a stage may keep a part of its model in eval mode
                module.training = training


def ask(model, tokenizer, case: dict, chat: bool, max_new_tokens: int) -> str:
    """The greedy reply to a row's prompt; `max_new_tokens` is for rows that do not say.

    Args:
        chat: render a conversation; else the model continues the prompt as plain text, and "system" is left out.
    """
    if chat:
        messages = [{"role": "system", "content": case["system"]}] if case.get("system") else []
        messages.append({"role": "user", "content": case["prompt"]})
        ids = render(tokenizer, messages, add_generation_prompt=True).input_ids
    else:
        ids = [tokenizer.bos_token_id, *encode_text(tokenizer, case["prompt"])]
    return reply(model, tokenizer, ids, case.get("max_new_tokens", max_new_tokens))[0]


def run_cases(
    model, tokenizer, cases: list[dict], chat: bool, max_new_tokens: int = ANSWER_TOKENS, stop=None, say=None
) -> dict | None:
    """Ask all and count: {"pass_rate", "passed", "total", "results": [{id, prompt, response, passed, why, seconds}]}.

    Args:
        stop: asked before each case; if it says True, that is the end and None is returned.
        say: told each result, as a line or more of text.
    """
    results = []
    with answering(model):
        for case in cases:
            if stop is not None and stop():
                return None
            began = time.monotonic()
            text = ask(model, tokenizer, case, chat, max_new_tokens)
            results.append({"id": case["id"], "prompt": case["prompt"], "response": text, **judge(text, case)})
            results[-1]["seconds"] = round(time.monotonic() - began, 3)
            if say is not None:
                say(_told(results[-1]))
    passed = sum(result["passed"] for result in results)
    return {"pass_rate": passed / len(results), "passed": passed, "total": len(results), "results": results}


def _told(result: dict) -> str:
    mark, why = ("right", "") if result["passed"] else ("wrong", f"\n    -> {result['why']}")
    return f"\n[{mark}] {result['id']}: {result['prompt']}\n{result['response']}{why}"


# --- in a training run ------------------------------------------------------------------------------------------------


def show_samples(run, chat: bool) -> None:
    """When a validation is due: continue each prompt of --sample_prompts, print it, add it to samples.jsonl.

    Args:
        run: the TrainRun; only its main process does anything. chat: as in `ask`.
    """
    if "val" not in run.due or run.args.sample_prompts == "none" or run.tokenizer is None or not is_main_process():
        return
    entries = []
    model = unwrap(run.model)
    with answering(model):
        for row in _remembered(read_prompts, str(run.args.sample_prompts)):
            if run.stopping:
                break
            text = ask(model, run.tokenizer, row, chat, SAMPLE_TOKENS)
            entries.append({"update": run.updates, "prompt": row["prompt"], "response": text})
            Logger(one_line(f"sample: {one_line(row['prompt'], PROMPT_COLUMNS)} -> {text}"))
    with _warning_of_failure(run.folder / "samples.jsonl") as path:
        _add_samples(path, entries, run.updates)


def _add_samples(path: Path, entries: list[dict], update: int) -> None:
    """Add rows to a file; those of this update and later ones, from before a resume, give way to them."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = [line for line in lines if json.loads(line)["update"] < update]
    text = "".join(line + "\n" for line in [*lines, *(json.dumps(entry, ensure_ascii=False) for entry in entries)])
    atomic_write(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8", newline="\n"))


def check_regression(run, chat: bool) -> None:
    """When it is due: ask --regression_prompts, record the pass rate, write regression/step_000500.json.

    After a signal to stop, what was asked so far is dropped. Arguments as of `show_samples`.
    """
    if "regression" not in run.due or not is_main_process():
        return
    assert run.tokenizer is not None, "--regression_eval needs a run with a tokenizer"
    cases = _remembered(read_cases, str(run.args.regression_prompts))
    found = run_cases(unwrap(run.model), run.tokenizer, cases, chat, stop=lambda: run.stopping)
    if found is None:
        return
    folder = run.folder / "regression"
    changed = _changed(_results_before(folder, run.updates), found["results"])
    with _warning_of_failure(folder / f"step_{run.updates:06d}.json") as path:
        write_json(path, {"step": run.updates, **found})
    line = f"regression: {found['passed']} of {found['total']} passed{changed}"
    run.monitor.record(
        one_line(line, 2 * COLUMNS), regression_pass_rate=found["pass_rate"], regression_passed=found["passed"]
    )


def _results_before(folder: Path, update: int) -> list[dict]:
    """The results of the last check before this one; none at the first."""
    steps = {int(path.stem.removeprefix("step_")): path for path in folder.glob("step_*.json")}
    earlier = [step for step in steps if step < update]
    return json.loads(steps[max(earlier)].read_text(encoding="utf-8"))["results"] if earlier else []


def _changed(before: list[dict], now: list[dict]) -> str:
    """' (new: a; lost: b)': what passes now and did not before, and the other way round; "" if nothing changed."""
    passed = {result["id"]: result["passed"] for result in before}
    changed = [result for result in now if passed.get(result["id"], result["passed"]) != result["passed"]]
    parts = []
    for word, wanted in (("new", True), ("lost", False)):
        names = [result["id"] for result in changed if result["passed"] == wanted]
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            parts.append(f"{word}: {', '.join(names[:NAMED])}{more}")
    return f" ({'; '.join(parts)})" if parts else ""


@contextmanager
def _warning_of_failure(path: Path):
    """A record that cannot be written (a full disk) is no reason to end a training."""
    try:
        yield path
    except OSError as error:
        Logger(f"warning: {path} could not be written ({error}); the training goes on without it")


def one_line(text: str, columns: int = COLUMNS) -> str:
    """Text as a terminal can show it in one line: the rest cut off, line breaks, control characters, and whatever its
    encoding lacks, escaped. A Chinese character takes two columns."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    encoding = sys.stdout.encoding or "utf-8"
    shown = shown.encode(encoding, "backslashreplace").decode(encoding)
    widths = [2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in shown]
    if sum(widths) <= columns:
        return shown
    used, end = 3, 0
    while used + widths[end] <= columns:
        used, end = used + widths[end], end + 1
    return shown[:end] + "..."
