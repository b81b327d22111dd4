"""Short descriptions of things of daily life, alone or several in one text, from topics.txt."""

from random import Random

from scripts.sample_data.writing import capital, join, load, some, spin

TEXT = load("topics")
PEOPLE = load("world")
KIDS = load("lore")


def described(rng: Random, lang: str, row: dict, opening: str = "") -> str:
    """Two to four sentences about one thing, the first of them the most important one."""
    facts = {part: row[f"{part}_{lang}"] for part in "abcd"}
    patterns = [opening or ("{a}。" if lang == "zh" else "{a}."), TEXT[f"more.{lang}"][0]]
    return join(lang, [spin(rng, pattern, zh=row["zh"], en=row["en"], **facts) for pattern in patterns])


def topic(rng: Random, lang: str, row: dict) -> str:
    """One thing, as a text of its own or as somebody's words."""
    names = {"who": rng.choice(PEOPLE[f"names.{lang}"]), "kid": rng.choice(KIDS[f"kids.{lang}"])}
    if rng.random() < 0.4:
        return described(rng, lang, row, TEXT[f"open.{lang}"][0])
    text = described(rng, lang, row)
    return capital(spin(rng, TEXT[f"frame.{lang}"][0], text=text, zh=row["zh"], en=row["en"], **names))


def collection(rng: Random, lang: str, row: dict) -> str:
    """Three to ten things, a paragraph each: some of the longest texts."""
    others = some(rng, [other for other in TEXT["topics"] if other != row], 2, 9)
    return "\n".join(described(rng, lang, thing) for thing in [row, *others])


KINDS = [
    ("topic", topic, TEXT["topics"], 6),
    ("collection", collection, TEXT["topics"], 3),
]
