"""Texts about elements, planets, animals, plants and food, from the tables of nature.txt."""

from random import Random

from scripts.sample_data.writing import join, listing, load, paragraph, some, spin

TEXT = load("nature")
NAMES = load("world")
SORTS = {lang: {row["sort"]: row["text"] for row in TEXT[f"sort.{lang}"]} for lang in ("zh", "en")}
DAYS = {"zh": list("一二三四五六"), "en": ["Monday", "Wednesday", "Friday", "Saturday", "Sunday"]}


def described(rng: Random, lang: str, kind: str, row: dict) -> str:
    """The opening sentence of a kind of thing, then some of its details in any order."""
    if kind == "animal":
        row = {**row, "sorts": "fish" if row["sort_en"] == "fish" else row["sort_en"] + "s"}
    if kind == "element":
        row = {**row, "protons": "one proton" if row["number"] == "1" else row["number"] + " protons"}
    details = TEXT[f"{kind}.detail.{lang}"]
    return paragraph(rng, lang, TEXT[f"{kind}.open.{lang}"] + some(rng, details, 1, len(details)), **row)


def element(rng: Random, lang: str, row: dict) -> str:
    """One element, often with a second one."""
    rows = [row] if rng.random() < 0.5 else [row, rng.choice([other for other in TEXT["elements"] if other != row])]
    return join(lang, [described(rng, lang, "element", row) for row in rows])


def planet(rng: Random, lang: str, row: dict) -> str:
    """One planet, or two or three of them, a paragraph each."""
    rows = [row, *some(rng, [other for other in TEXT["planets"] if other != row], 0, 2)]
    return "\n".join(described(rng, lang, "planet", row) for row in rows)


def animal(rng: Random, lang: str, row: dict) -> str:
    """One animal and, half of the time, what its class of animals has in common."""
    text = described(rng, lang, "animal", row)
    if rng.random() < 0.5:
        text = join(lang, [text, spin(rng, SORTS[lang][row[f"sort_{lang}"]])])
    return text


def zoo(rng: Random, lang: str, row: dict) -> str:
    """A visit where several animals are described."""
    rows = [row, *some(rng, [other for other in TEXT["animals"] if other != row], 1, 4)]
    names = [row["zh" if lang == "zh" else "plural"] for row in rows]
    values = {
        "who": rng.choice(NAMES[f"names.{lang}"]),
        "place": rng.choice(TEXT[f"zoo.place.{lang}"]),
        "day": rng.choice(DAYS[lang]),
        "names": listing(names, lang),
        "last": names[-1],
    }
    parts = [paragraph(rng, lang, TEXT[f"zoo.start.{lang}"], **values)]
    parts += [described(rng, lang, "animal", row) for row in rows]
    return join(lang, [*parts, spin(rng, TEXT[f"zoo.end.{lang}"][0], **values)])


def plant(rng: Random, lang: str, row: dict) -> str:
    """One or two plants or kinds of food."""
    rows = [row, *some(rng, [other for other in TEXT["plants"] if other != row], 0, 1)]
    return join(lang, [described(rng, lang, "plant", row) for row in rows])


def garden(rng: Random, lang: str, row: dict) -> str:
    """Several plants in one text."""
    rows = [row, *some(rng, [other for other in TEXT["plants"] if other != row], 2, 4)]
    values = {"who": rng.choice(NAMES[f"names.{lang}"]), "place": rng.choice(TEXT[f"garden.place.{lang}"])}
    start = paragraph(rng, lang, TEXT[f"garden.start.{lang}"], **values)
    return join(lang, [start, *(described(rng, lang, "plant", row) for row in rows)])


KINDS = [
    ("element", element, TEXT["elements"], 4),
    ("planet", planet, TEXT["planets"], 2),
    ("animal", animal, TEXT["animals"], 5),
    ("zoo", zoo, TEXT["animals"], 5),
    ("plant", plant, TEXT["plants"], 3),
    ("garden", garden, TEXT["plants"], 3),
]
