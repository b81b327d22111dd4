"""Explanations of Python with short programs that run; the comment in the last line is what the program prints.

The programs are in code.txt: names, variables and examples are drawn, and a test runs them all.
"""

from pathlib import Path
from random import Random
from string import Template

from scripts.sample_data.writing import capital, some, spin

FRAMES = {
    "zh": [
        "[下面的代码{zh}。|这段Python代码{zh}。|用Python{zh}，可以这样写：|怎样用Python{zh}？请看下面的代码。]\n{code}\n{why}",
        "问：怎样用Python{zh}？\n答：{why}\n{code}",
        "{why}[例如，|比如，|所以，][下面的程序|这段代码]{zh}：\n{code}",
        "练习：写一段Python代码，{zh}。\n参考答案：\n{code}\n说明：{why}",
    ],
    "en": [
        "[The following Python code {en}.|This program {en}.|Here is some Python that {en}.]\n{code}\n{why}",
        "Question: How do I write Python code that {en}?\nAnswer: {why}\n{code}",
        "{why} [For example, this|The following] code {en}:\n{code}",
        "Exercise: write Python code that {en}.\nSolution:\n{code}\nExplanation: {why}",
    ],
}


def parse(text: str) -> dict:
    """One entry of code.txt: header lines up to "code:", then the program."""
    head, _, code = text.partition("\ncode:\n")
    entry: dict = {"code": code.rstrip("\n"), "cases": []}
    for line in head.strip().splitlines():
        key, _, value = line.partition(": ")
        if key == "case":
            entry["cases"].append(dict(part.split("=", 1) for part in value.split("; ")))
        else:
            entry[key] = value.split() if key in ("name", "x", "y") else value
    return entry


ENTRIES = [parse(text) for text in (Path(__file__).parent / "code.txt").read_text(encoding="utf-8").split("\n---\n")]


def program(rng: Random, lang: str, entry: dict) -> str:
    """The program of an entry with drawn names and example, half of the time with a docstring."""
    pair = rng.randrange(len(entry["x"]))  # both variables from the same place: first and second, not first and n
    values = {"name": rng.choice(entry["name"]), "x": entry["x"][pair], "y": entry["y"][pair % len(entry["y"])]}
    doc = f'"""{capital(entry[lang])}{"。" if lang == "zh" else "."}"""'
    lines = entry["code"].splitlines()
    if rng.random() < 0.5 and "class" not in lines[0]:
        lines = [line for line in lines if line.strip() != "$doc"]
    return Template("\n".join(lines)).substitute(values, doc=doc, **rng.choice(entry["cases"]))


def explanation(rng: Random, lang: str, entry: dict) -> str:
    """One program with an explanation before or behind it."""
    fence = f"```python\n{program(rng, lang, entry)}\n```"
    frame = rng.choice(FRAMES[lang])
    return spin(rng, frame, code=fence, why=entry[f"why_{lang}"], **{lang: entry[lang]})


def lesson(rng: Random, lang: str, entry: dict) -> str:
    """Two to four programs in one text."""
    entries = [entry, *some(rng, [other for other in ENTRIES if other is not entry], 1, 3)]
    start = (
        "[Python小课堂|今天的编程练习|几个Python小例子]"
        if lang == "zh"
        else "[A short Python lesson|Some small programs|Python by example]"
    )
    return "\n\n".join([spin(rng, start), *(explanation(rng, lang, entry) for entry in entries)])


KINDS = [
    ("program", explanation, ENTRIES, 9),
    ("lesson", lesson, ENTRIES, 5),
]
