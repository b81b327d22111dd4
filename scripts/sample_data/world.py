"""Texts about countries, cities, rivers, mountains and seas, from the tables of world.txt."""

from random import Random

from scripts.sample_data.writing import capital, join, listing, load, paragraph, some, spin

TEXT = load("world")
COUNTRIES, PLACES = TEXT["countries"], TEXT["places"]
CONTINENTS = sorted({row["continent_zh"] for row in COUNTRIES})
ORDER = {
    "zh": ["第一站", "第二站", "第三站", "第四站"],
    "en": ["First", "Then", "After that", "At the end of the journey"],
}


def country(rng: Random, lang: str, row: dict) -> str:
    """Capital first, then some of language, money and what the country is known for."""
    patterns = TEXT[f"country.open.{lang}"] + some(rng, TEXT[f"country.detail.{lang}"], 1, 3)
    if rng.random() < 0.4:
        patterns = patterns + TEXT[f"country.close.{lang}"]
    return paragraph(rng, lang, patterns, **row)


def of_continent(name_zh: str) -> list[dict]:
    return [row for row in COUNTRIES if row["continent_zh"] == name_zh]


def continent(rng: Random, lang: str, name: str) -> str:
    """Several countries of a continent with their capitals."""
    rows = some(rng, of_continent(name), 3, 7)
    names = listing([row[lang] for row in rows], lang)
    start = spin(rng, TEXT[f"continent.start.{lang}"][0], k=rows[0][f"continent_{lang}"], names=names)
    items = [spin(rng, TEXT[f"continent.item.{lang}"][0], **row) for row in rows]
    return start + "；".join(items) + "。" if lang == "zh" else join(lang, [start, *items])


def comparison(rng: Random, lang: str, first: dict) -> str:
    """Two countries side by side."""
    other = rng.choice([row for row in COUNTRIES if row is not first])
    sentences = compare_zh(first, other) if lang == "zh" else compare_en(first, other)
    start = spin(rng, TEXT[f"comparison.start.{lang}"][0], a=first[lang], b=other[lang])
    return join(lang, [start, sentences[0], *some(rng, sentences[1:], 2, 3)])


def compare_zh(first: dict, other: dict) -> list[str]:
    a, b = first["zh"], other["zh"]
    where = f"{a}在{first['continent_zh']}，而{b}在{other['continent_zh']}。"
    if first["continent_zh"] == other["continent_zh"]:
        where = f"{a}和{b}都在{first['continent_zh']}。"
    speech = f"在{a}，学校和机关使用{first['language_zh']}；在{b}，使用{other['language_zh']}。"
    if first["language_zh"] == other["language_zh"]:
        speech = f"两个国家都通用{first['language_zh']}。"
    capitals = f"{a}的首都是{first['capital_zh']}，{b}的首都是{other['capital_zh']}。"
    return [where, speech, capitals, f"{a}以{first['known_zh']}闻名，{b}则以{other['known_zh']}闻名。"]


def compare_en(first: dict, other: dict) -> list[str]:
    a, b = first["en"], other["en"]
    where = f"{a} is in {first['continent_en']}, while {b} is in {other['continent_en']}."
    if first["continent_en"] == other["continent_en"]:
        where = f"{a} and {b} are both in {first['continent_en']}."
    speech = f"schools in {a} use {first['language_en']}; in {b} they use {other['language_en']}."
    if first["language_en"] == other["language_en"]:
        speech = f"schools in both countries use {first['language_en']}."
    capitals = f"the capital of {a} is {first['capital_en']}, and the capital of {b} is {other['capital_en']}."
    return [where, speech, capitals, f"{a} is known for {first['known_en']}, and {b} for {other['known_en']}."]


def journey(rng: Random, lang: str, name: str) -> str:
    """A travel story through the capitals of a continent, one paragraph per stop."""
    rows = some(rng, of_continent(name), 2, 4)
    who = rng.choice(TEXT[f"names.{lang}"])
    values = {"who": who, "k": rows[0][f"continent_{lang}"], "n": rng.randint(10, 30)}
    start = spin(rng, TEXT[f"journey.start.{lang}"][0], **values)
    stops = [
        spin(rng, TEXT[f"journey.stop.{lang}"][0], day=day, who=who, **row)
        for day, row in zip(ORDER[lang], rows, strict=False)
    ]
    return "\n".join([start, *stops, spin(rng, TEXT[f"journey.end.{lang}"][0], who=who)])


def places(rng: Random, lang: str, first: dict) -> str:
    """Some rivers, mountains, seas or cities with a sentence or two each."""
    same = [row for row in PLACES if row["sort_zh"] == first["sort_zh"] and row is not first]
    sort = first[f"sort_{lang}"]
    if lang == "en":
        sort = {"city": "cities", "sea or ocean": "seas and oceans"}.get(sort, sort + "s")
    start = spin(rng, TEXT[f"places.start.{lang}"][0], s=sort, zh=first["zh"])
    return join(lang, [capital(start)] + [row[f"fact_{lang}"] for row in [first, *some(rng, same, 1, 3)]])


KINDS = [  # name, writer, topics, share of the text
    ("country", country, COUNTRIES, 6),
    ("continent", continent, CONTINENTS, 3),
    ("comparison", comparison, COUNTRIES, 3),
    ("journey", journey, CONTINENTS, 3),
    ("places", places, PLACES, 4),
]
