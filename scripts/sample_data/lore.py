"""Why-questions, history, idioms and sayings, advice and instructions, from the tables of lore.txt."""

from random import Random

from scripts.sample_data.writing import capital, join, load, some, spin

TEXT = load("lore")
PEOPLE = load("world")
FIRST = {"zh": ["首先", "然后", "接着", "最后"], "en": ["first", "then", "after that", "finally"]}


def explained(rng: Random, lang: str, row: dict) -> str:
    """The answer of a why-question in two or three sentences."""
    parts = [spin(rng, row[f"{part}_{lang}"]) for part in "abc"]
    return join(lang, parts if rng.random() < 0.8 else parts[:2])


def why(rng: Random, lang: str, row: dict) -> str:
    """One why-question in a frame: question and answer, or a child who asks."""
    ask = row[f"ask_{lang}"]
    values = {
        "ask": ask,
        "Ask": capital(ask),
        "answer": explained(rng, lang, row),
        "kid": rng.choice(TEXT[f"kids.{lang}"]),
        "adult": rng.choice(TEXT[f"adults.{lang}"]),
    }
    text = join(lang, [spin(rng, rng.choice(TEXT[f"why.frame.{lang}"]), **values)])
    return text if lang == "zh" else text.replace('." said', '," said')


def whys(rng: Random, lang: str, row: dict) -> str:
    """Three to ten questions with their answers: long rows."""
    rows = [row, *some(rng, [other for other in TEXT["why"] if other != row], 2, 9)]
    head = {
        "zh": [("问：", "答："), ("", ""), ("学生：", "老师：")],
        "en": [("Q: ", "A: "), ("", ""), ("Student: ", "Teacher: ")],
    }
    ask, answer = rng.choice(head[lang])
    mark = "？" if lang == "zh" else "?"
    lines = [f"{ask}{capital(row[f'ask_{lang}'])}{mark}\n{answer}{explained(rng, lang, row)}" for row in rows]
    return "\n".join(lines)


def history(rng: Random, lang: str, row: dict) -> str:
    """One to four events in order of time."""
    rows = [row, *some(rng, [other for other in TEXT["history"] if other != row], 0, 3)]
    rows.sort(key=lambda event: int(event["year"]))
    start = spin(rng, TEXT[f"history.start.{lang}"][0], who=rng.choice(PEOPLE[f"names.{lang}"])) if rows[1:] else ""
    return join(lang, [start, *(spin(rng, TEXT[f"history.{lang}"][0], **event) for event in rows)])


def idioms(rng: Random, lang: str, row: dict) -> str:
    """One to four Chinese idioms or English sayings with their meaning."""
    table, pattern = ("idioms", "idiom.zh") if lang == "zh" else ("sayings", "saying.en")
    rows = [row, *some(rng, [other for other in TEXT[table] if other != row], 0, 3)]
    texts = [spin(rng, TEXT[pattern][0], **row) for row in rows]
    if lang == "zh" and rows[1:]:
        texts.insert(0, spin(rng, TEXT["idioms.start.zh"][0], who=rng.choice(PEOPLE["names.zh"])))
    return join(lang, texts)


def advice(rng: Random, lang: str, row: dict) -> str:
    """Two to four pieces of advice, as a sentence or as a list."""
    tips = some(rng, [row[f"t{number}_{lang}"] for number in range(1, 5)], 2, 4)
    start = spin(rng, TEXT[f"advice.start.{lang}"][0], t=row[f"topic_{lang}"], who=rng.choice(PEOPLE[f"names.{lang}"]))
    end = spin(rng, TEXT[f"advice.end.{lang}"][0])
    if rng.random() < 0.5:
        lines = [f"{number}. {capital(tip)}{'。' if lang == 'zh' else '.'}" for number, tip in enumerate(tips, 1)]
        return "\n".join([capital(start), *lines] + ([capital(end)] if end else []))
    if lang == "zh":
        return start + "；".join(tips) + "。" + end
    return join(lang, [start, *(tip + "." for tip in tips), end])


def howto(rng: Random, lang: str, row: dict) -> str:
    """Four steps in order, numbered or told with first, then, after that, finally."""
    who = rng.choice(PEOPLE[f"names.{lang}"])
    steps = [row[f"s{number}_{lang}"] for number in range(1, 5)]
    start = spin(rng, TEXT[f"howto.start.{lang}"][0], t=row[f"t_{lang}"], who=who)
    stop = "。" if lang == "zh" else "."
    if rng.random() < 0.5:
        return "\n".join([join(lang, [start]), *(f"{i}. {capital(step)}{stop}" for i, step in enumerate(steps, 1))])
    if lang == "zh":
        return start + "，".join(f"{word}{step}" for word, step in zip(FIRST["zh"], steps, strict=True)) + "。"
    return join(lang, [start, *(f"{word} {step}." for word, step in zip(FIRST["en"], steps, strict=True))])


KINDS = [
    ("why", why, TEXT["why"], 5),
    ("whys", whys, TEXT["why"], 5),
    ("history", history, TEXT["history"], 4),
    ("idioms", idioms, {"zh": TEXT["idioms"], "en": TEXT["sayings"]}, 3),
    ("advice", advice, TEXT["advice"], 3),
    ("howto", howto, TEXT["howto"], 2),
]
