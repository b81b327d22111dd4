"""Stories, put together from an opening, one to four episodes and an ending, and dialogues; texts in tales.txt."""

from random import Random

from scripts.sample_data import lore, nature, world
from scripts.sample_data.writing import capital, load, spin, tidy

TEXT = load("tales")
SLOTS = ("adj", "weather", "time", "thing", "food", "animal")


def slots(rng: Random, lang: str) -> dict:
    """The people, things and places of one story."""
    hero = rng.choice(TEXT[f"heroes.{lang}"])
    values = {slot: rng.choice(TEXT[f"{slot}.{lang}"]) for slot in SLOTS}
    values["place"] = rng.choice(TEXT[f"places.{lang}"])
    values["f"] = rng.choice(TEXT[f"friends.{lang}"])
    if lang == "en":
        values["P"] = capital(hero["he"])
    return {**hero, **values}


def story(rng: Random, lang: str, episodes: list[int]) -> str:
    """One story with the given episodes; long ones get a paragraph for each."""
    values = slots(rng, lang)
    start = spin(rng, rng.choice(TEXT[f"open.{lang}"]), **values)
    parts = []
    for number, episode in enumerate(episodes):
        # later episodes are about other things and animals, with the same hero and friend
        fresh = {slot: rng.choice(TEXT[f"{slot}.{lang}"]) for slot in ("thing", "food", "animal")}
        pattern = TEXT[f"episode.{lang}"][episode]
        link = spin(rng, TEXT[f"link.{lang}"][0]) if number else ""
        text = spin(rng, pattern, **{**values, **fresh})
        parts.append(link + text if lang == "zh" else f"{link} {capital(text)}".strip())
    end = spin(rng, rng.choice(TEXT[f"close.{lang}"]), **values) if rng.random() < 0.6 or len(parts) > 1 else ""
    glue = "\n" if len(parts) > 1 else ("" if lang == "zh" else " ")
    return glue.join(text for text in [start, *parts, end] if text)


def short_story(rng: Random, lang: str, episode: int) -> str:
    """A story with one episode."""
    return story(rng, lang, [episode])


def long_story(rng: Random, lang: str, episode: int) -> str:
    """A story with two to nine episodes, up to about three thousand characters."""
    others = [number for number in range(len(TEXT[f"episode.{lang}"])) if number != episode]
    return story(rng, lang, [episode, *rng.sample(others, rng.choice([1, 1, 1, 2, 2, 3, 4, 8]))])


def dialogue(rng: Random, lang: str, pattern: str) -> str:
    """A short conversation of daily life."""
    values = slots(rng, lang)
    a, b = rng.choice(TEXT[f"friends.{lang}"]), rng.choice(TEXT[f"heroes.{lang}"])["h"]
    return spin(rng, pattern, **values, a=a, b=b, n=rng.randint(3, 60), k=rng.randint(2, 9), m=rng.randint(4, 40))


def plain_lines(seed: int) -> list[str]:
    """The lines of plain.txt: single sentences and short paragraphs, Chinese and English in turn."""
    lines = []
    for lang in ("zh", "en"):
        rng = Random(f"{seed} plain {lang}")
        texts = TEXT[f"plain.{lang}"] + [world.country(rng, lang, row) for row in world.COUNTRIES[::5]]
        texts += [nature.animal(rng, lang, row) for row in nature.TEXT["animals"][::6]]
        texts += [lore.explained(rng, lang, row) for row in lore.TEXT["why"][::8]]
        lines.append([tidy(text.replace("\n", " ")) for text in texts])
    return [line for pair in zip(*lines, strict=True) for line in pair]


EPISODES = {lang: list(range(len(TEXT[f"episode.{lang}"]))) for lang in ("zh", "en")}
KINDS = [
    ("story", short_story, EPISODES, 12),
    ("long_story", long_story, EPISODES, 10),
    ("dialogue", dialogue, {lang: TEXT[f"dialogue.{lang}"] for lang in ("zh", "en")}, 4),
]
