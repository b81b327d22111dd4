"""The little language in which all sample texts are written, and the files that hold the texts.

A pattern has choices in square brackets and values in braces: "[{n} lies in {k}.|You find {n} in {k}.]". Only the
generator handed in decides, so that one seed gives one text on every machine.
"""

import re
import unicodedata
from pathlib import Path
from random import Random

CHOICE = re.compile(r"\[([^\[\]]*)\]")
CELL = re.compile(r"\s*\|(?![^\[]*\])\s*")  # a bar inside a choice does not separate cells
SENTENCE = re.compile(r"(?<!D\.C)([.?!] )([a-z])")


def load(name: str) -> dict[str, list]:
    """Read a text file of this folder into its sections.

    "@ name" starts a list of lines, "@ name: field field" a table (a list of dicts), "#" a comment; "\\n" inside
    a pattern stands for a line break.
    """
    sections: dict[str, list] = {}
    path = Path(__file__).parent / f"{name}.txt"
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("@ "):
            title, _, fields = line[2:].partition(":")
            rows, names = sections.setdefault(title.strip(), []), fields.split()
        elif line.strip() and not line.startswith("#"):
            line = line.replace("\\n", "\n")
            cells = CELL.split(line.strip()) if names else []
            if len(cells) != len(names):
                raise ValueError(f"{path}:{number}: {len(cells)} cells instead of {len(names)}: {line}")
            rows.append(dict(zip(names, cells, strict=True)) if names else line)
    return sections


def spin(rng: Random, pattern: str, **values: object) -> str:
    """Resolve the choices of a pattern, innermost first, then fill in the values."""
    while match := CHOICE.search(pattern):
        pattern = pattern[: match.start()] + rng.choice(match.group(1).split("|")) + pattern[match.end() :]
    return pattern.format(**values)


def capital(text: str) -> str:
    """Upper-case the first letter, leave the rest as it is."""
    return text[:1].upper() + text[1:]


def paragraph(rng: Random, lang: str, patterns: list[str], **values: object) -> str:
    """One paragraph of several patterns; English sentences get a capital and a space between them."""
    texts = [spin(rng, pattern, **values) for pattern in patterns]
    return join(lang, texts)


def join(lang: str, texts: list[str]) -> str:
    """Sentences to a paragraph; empty ones are dropped."""
    texts = [text for text in texts if text]
    if lang == "zh":
        return "".join(texts)
    return SENTENCE.sub(lambda match: match.group(1) + match.group(2).upper(), " ".join(map(capital, texts)))


def tidy(text: str) -> str:
    """The last touch of every text: composed characters, no double full stop after an abbreviation."""
    return unicodedata.normalize("NFC", text.strip()).replace("D.C..", "D.C.")


def some(rng: Random, items: list, low: int, high: int) -> list:
    """Between low and high different items, in random order."""
    return rng.sample(items, min(len(items), rng.randint(low, high)))


def listing(words: list[str], lang: str) -> str:
    """Words as a list in a sentence: a, b and c."""
    if len(words) == 1:
        return words[0]
    if lang == "zh":
        return "、".join(words[:-1]) + "和" + words[-1]
    return ", ".join(words[:-1]) + " and " + words[-1]


def article(noun: str) -> str:
    """The noun with a or an, by its first letter."""
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun
