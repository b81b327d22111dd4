"""Conversations for fine-tuning: short true answers to questions in many phrasings, and five evaluation questions."""

import json
from random import Random

from scripts.sample_data import numbers, tales
from scripts.sample_data.world import COUNTRIES
from scripts.sample_data.writing import capital, join, load, some, spin, tidy

TEXT = load("chat")
NATURE = load("nature")
LORE = load("lore")
CORE_ROWS, IDENTITY_ROWS, SOCIAL_ROWS, FACT_ROWS = 50, 16, 16, 6  # rows per question of each table
VAL_ROWS = 150
JOINED, WITH_SYSTEM = 0.13, 0.25

EVALUATION = [
    {"prompt": "你是谁？", "expect": [["小敏"]]},
    {"prompt": "中国的首都是哪里？", "expect": [["北京"]]},
    {"prompt": "为什么天空是蓝色的？", "expect": [["散射"]]},
    {"prompt": "What is the capital of France?", "expect": [["Paris"]]},
    {"prompt": "How many days are there in a week?", "expect": [["seven", "Seven", "7"]]},
]


def evaluation() -> list[dict]:
    """The questions of chat_eval.jsonl; an answer is right when it holds one alternative of every inner list."""
    return EVALUATION


def patterns(rng: Random, name: str, lang: str, count: int) -> list[tuple[str, str]]:
    """`count` questions and answers for every row of a table of patterns, all its phrasings used about equally."""
    pairs = []
    for row in TEXT[f"{name}.{lang}"]:
        asks = row["q"].strip("[]").split("|")
        for i in range(count):
            pairs.append((asks[i % len(asks)], spin(rng, row["a"])))
    return pairs


def capitals(rng: Random, lang: str) -> list[tuple[str, str]]:
    """The capital of every country in up to four phrasings, its continent in one."""
    pairs = []
    answer = {"zh": "[{zh}的首都是{capital_zh}。|{zh}的首都是{capital_zh}。|{capital_zh}是{zh}的首都。]"}
    answer["en"] = (
        "[The capital of {en} is {capital_en}.|The capital of {en} is {capital_en}.|{cap} is the capital of {en}.]"
    )
    for row in COUNTRIES:
        row = {**row, "cap": row["capital_en"]}
        for _ in range(4):
            pairs.append((spin(rng, TEXT[f"ask.capital.{lang}"][0], **row), spin(rng, answer[lang], **row)))
        where = "{zh}位于{continent_zh}。" if lang == "zh" else "{en} is in {continent_en}."
        pairs.append((spin(rng, TEXT[f"ask.continent.{lang}"][0], **row), capital(where.format(**row))))
    return pairs


def nature(rng: Random, lang: str) -> list[tuple[str, str]]:
    """Elements and animals: symbol, number, food, home, class."""
    pairs = []
    answers = {
        "symbol": ("{zh}的元素符号是{symbol}。", "The chemical symbol of {en} is {symbol}."),
        "number": ("{zh}的原子序数是{number}。", "The atomic number of {en} is {number}."),
        "food": ("{zh}吃{food_zh}。", "{Plural} eat {food_en}."),
        "home": ("{zh}生活在{home_zh}。", "{Plural} live {home_en}."),
        "sort": ("{zh}是{sort_zh}，{zh}{fact_zh}。", "{Plural} are {sorts}. They {fact_en}."),
    }
    for table, asks in (("elements", ("symbol", "number")), ("animals", ("food", "home", "sort"))):
        for row in NATURE[table]:
            values = {**row, "Plural": capital(row.get("plural", "")), "sorts": row.get("sort_en", "") + "s"}
            values["sorts"] = "fish" if values["sorts"] == "fishs" else values["sorts"]
            for ask in asks:
                question = spin(rng, TEXT[f"ask.{ask}.{lang}"][0], **values)
                pairs.append((question, answers[ask][lang == "en"].format(**values)))
    return pairs


def sums(rng: Random, lang: str) -> list[tuple[str, str]]:
    """All sums of two numbers up to ten in part, some bigger ones, and short word problems."""
    pairs = []
    for i in range(330):
        sign = "+-×+"[i % 4]
        a, b, result = numbers.operation(rng, sign, 10 if i % 3 else 20)
        word = numbers.SIGNS[sign][lang == "en"]
        if lang == "zh":
            ask = "[{a}{w}{b}等于多少？|{a} {s} {b} = ?|{a}{w}{b}等于几？|请计算{a} {s} {b}。|{a} {s} {b}等于多少？]"
            answer = "[{a} {s} {b} = {r}。|{a}{w}{b}等于{r}。]"
        else:
            ask = "[What is {a} {w} {b}?|{a} {s} {b} = ?|How much is {a} {w} {b}?|Calculate {a} {s} {b}.]"
            answer = "[{a} {s} {b} = {r}.|{a} {w} {b} is {r}.]"
        values = {"a": a, "b": b, "r": result, "w": word, "s": sign}
        question = spin(rng, ask, **values)
        if question.endswith("= ?"):  # neither Chinese nor English, so neither is the answer
            answer = "{a} {s} {b} = {r}"
        pairs.append((question, spin(rng, answer, **values)))
    for row in numbers.TEXT["problems"] * 2:
        thing, who = rng.choice(numbers.TEXT["things"]), rng.choice(numbers.PEOPLE[f"names.{lang}"])
        filled = spin(rng, row[lang], who=who, thing=thing["zh"], things=thing["many"], **numbers.drawn(rng, row))
        pairs.append(tuple(filled.split("\n", 1)))
    return pairs


def words(rng: Random, lang: str) -> list[tuple[str, str]]:
    """Translations of words and sentences, and opposites."""
    pairs = []
    for row in TEXT["words"]:
        if lang == "zh":
            ask = "[“{zh}”用英语怎么说？|{zh}的英文是什么？|把“{zh}”翻译成英文。]"
            pairs.append((spin(rng, ask, **row), spin(rng, "“{zh}”的英文是{en}。", **row)))
        else:
            pairs.append(
                (spin(rng, 'What does the Chinese word "{zh}" mean?', **row), spin(rng, '"{zh}" means "{en}".', **row))
            )
            ask = '[What is "{en}" in Chinese?|How do you say "{en}" in Chinese?]'
            pairs.append((spin(rng, ask, **row), spin(rng, 'The Chinese word for "{en}" is "{zh}".', **row)))
    for row in TEXT["sentences"]:
        ask = (
            "[把这句话翻译成英文：{zh}|请翻译成英语：{zh}]"
            if lang == "zh"
            else "[Translate into Chinese: {en}|Say this in Chinese: {en}]"
        )
        pairs.append((spin(rng, ask, **row), row["en" if lang == "zh" else "zh"]))
    for row in TEXT[f"opposites.{lang}"]:
        for a, b in ((row["a"], row["b"]), (row["b"], row["a"])):
            if lang == "zh":
                ask, answer = "[“{a}”的反义词是什么？|{a}的反义词是什么？]", "“{a}”的反义词是“{b}”。"
            else:
                ask, answer = (
                    '[What is the opposite of "{a}"?|Give me the opposite of {a}.]',
                    'The opposite of "{a}" is "{b}".',
                )
            pairs.append((spin(rng, ask, a=a, b=b), answer.format(a=a, b=b)))
    return pairs


def knowledge(rng: Random, lang: str) -> list[tuple[str, str]]:
    """Why-questions, history, idioms, advice, counting."""
    pairs = []
    for row in LORE["why"][1:] * 2:  # the first one, the blue sky, is a core question with one kind of answer
        ask = row[f"ask_{lang}"]
        wrap = "[{q}？|请问{q}？|你知道{q}吗？]" if lang == "zh" else "[{q}?|{q}?|Can you tell me this: {q}?]"
        pairs.append((capital(spin(rng, wrap, q=ask)), join(lang, [spin(rng, row[f"{p}_{lang}"]) for p in "ab"])))
    for row in LORE["history"]:
        ask, answer = (
            ("{year}年发生了什么？", "{year}年，{zh}。")
            if lang == "zh"
            else ("What happened in {year}?", "In {year}, {en}.")
        )
        pairs.append((ask.format(**row), answer.format(**row)))
    for row in LORE["idioms"] if lang == "zh" else LORE["sayings"]:
        if lang == "zh":
            pairs.append(
                (spin(rng, "[“{zh}”是什么意思？|成语{zh}是什么意思？]", **row), "“{zh}”的意思是{mean}。".format(**row))
            )
        else:
            pairs.append((spin(rng, 'What does "{en}" mean?', **row), "It means that {mean}.".format(**row)))
    for row in LORE["advice"] * 2:
        tips = some(rng, [row[f"t{i}_{lang}"] for i in range(1, 5)], 2, 2)
        if lang == "zh":
            pairs.append(
                (
                    spin(rng, "[怎样{t}？|怎么才能{t}？|请告诉我怎样{t}。]", t=row["topic_zh"]),
                    f"你可以试试：{tips[0]}；{tips[1]}。",
                )
            )
        else:
            ask = spin(rng, "[How can I {t}?|Please tell me how to {t}.|What can I do to {t}?]", t=row["topic_en"])
            pairs.append((ask, f"{capital(tips[0])}. {capital(tips[1])}."))
    return pairs + ordered(rng, lang)


def ordered(rng: Random, lang: str) -> list[tuple[str, str]]:
    """Counting and putting numbers in order."""
    pairs = []
    for _ in range(40):
        values = rng.sample(range(1, 30), 4)
        start = rng.randint(1, 6)
        up, count = sorted(values), [start + i for i in range(rng.randint(4, 7))]
        if lang == "zh":
            shown = "、".join(map(str, values))
            pairs.append((f"把{shown}从小到大排列。", "、".join(map(str, up)) + "。"))
            pairs.append((f"{shown}里面哪个最大？", f"最大的是{up[-1]}。"))
            pairs.append((f"从{count[0]}数到{count[-1]}。", "、".join(map(str, count)) + "。"))
        else:
            shown = ", ".join(map(str, values))
            pairs.append((f"Put these numbers in order: {shown}.", ", ".join(map(str, up)) + "."))
            pairs.append((f"Which is the largest of {shown}?", f"The largest is {up[-1]}."))
            pairs.append((f"Count from {count[0]} to {count[-1]}.", ", ".join(map(str, count)) + "."))
    return pairs


def all_pairs(rng: Random, lang: str) -> tuple[list, list]:
    """Questions that must be learned by heart, and the rest, without repeats in the rest."""
    core = patterns(rng, "core", lang, CORE_ROWS)
    rest = patterns(rng, "identity", lang, IDENTITY_ROWS) + patterns(rng, "social", lang, SOCIAL_ROWS)
    rest += patterns(rng, "unknown", lang, SOCIAL_ROWS) + patterns(rng, "facts", lang, FACT_ROWS)
    for source in (capitals, nature, sums, words, knowledge, stories):
        rest += source(rng, lang)
    return core, list(dict.fromkeys(rest))


def follow_ups(rng: Random, lang: str) -> list[list[tuple[str, str]]]:
    """Conversations whose second question makes sense only after the first one."""
    turns = []
    for row in COUNTRIES:
        others = some(rng, [other for other in COUNTRIES if other is not row], 1, 2)
        if lang == "zh":
            ask, then, answer = "{zh}的首都是哪里？", "[那{zh}呢？|{zh}呢？]", "{zh}的首都是{capital_zh}。"
        else:
            ask, then = "What is the capital of {en}?", "[And of {en}?|What about {en}?]"
            answer = "The capital of {en} is {capital_en}."
        talk = [(ask.format(**row), answer.format(**row))]
        turns.append(talk + [(spin(rng, then, **other), answer.format(**other)) for other in others])
    for _ in range(60):
        a, b, c = rng.randint(1, 20), rng.randint(1, 20), rng.randint(1, 10)
        first, second = f"{a} + {b} = {a + b}", f"{a + b} + {c} = {a + b + c}"
        if lang == "zh":
            turns.append([(f"{a}加{b}等于多少？", f"{first}。"), (f"再加{c}呢？", f"{second}。")])
        else:
            turns.append([(f"What is {a} plus {b}?", f"{first}."), (f"And if you add {c}?", f"{second}.")])
    return turns


def stories(rng: Random, lang: str) -> list[tuple[str, str]]:
    """Short stories on request."""
    pairs = []
    for episode in tales.EPISODES[lang] * 4:
        ask = "[给我讲个小故事。|讲一个故事吧。|请讲一个短故事。]"
        if lang == "en":
            ask = "[Tell me a story.|Please tell me a short story.|Can you tell me a little story?]"
        pairs.append((spin(rng, ask), tales.short_story(rng, lang, episode)))
    return pairs


def messages(turns: list[tuple[str, str]], system: str | None) -> dict:
    """One row in the chat format."""
    rows = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        rows += [{"role": "user", "content": tidy(question)}, {"role": "assistant", "content": tidy(answer)}]
    return {"conversations": rows}


def grouped(rng: Random, pairs: list, social: list) -> list[list[tuple[str, str]]]:
    """Most questions alone; some joined into conversations of two to four turns, now and then with a greeting."""
    turns, i = [], 0
    while i < len(pairs):
        many = rng.randint(2, 3) if rng.random() < JOINED else 1
        chunk = pairs[i : i + many]
        if many > 1 and rng.random() < 0.3:
            chunk = [rng.choice(social), *chunk]
        turns.append(chunk)
        i += many
    return turns


def conversations(seed: int) -> tuple[list[dict], list[dict]]:
    """Rows of sft.jsonl and sft_val.jsonl; no conversation of one occurs in the other."""
    rows = []
    for lang in ("zh", "en"):
        rng = Random(f"{seed} sft {lang}")
        core, rest = all_pairs(rng, lang)
        pairs = core + rest
        rng.shuffle(pairs)
        for turns in grouped(rng, pairs, patterns(rng, "social", lang, 6)) + follow_ups(rng, lang):
            system = rng.choice(TEXT[f"system.{lang}"]) if rng.random() < WITH_SYSTEM else None
            rows.append(messages(turns, system))
    Random(f"{seed} sft order").shuffle(rows)
    return hold_back(rows)


def hold_back(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Take the first rows of which no question with its answer occurs in any other row."""

    def pairs_of(row: dict) -> list[str]:
        turns = [m for m in row["conversations"] if m["role"] != "system"]
        return [json.dumps([q["content"], a["content"]]) for q, a in zip(turns[::2], turns[1::2], strict=True)]

    counts: dict[str, int] = {}
    for row in rows:
        for pair in pairs_of(row):
            counts[pair] = counts.get(pair, 0) + 1
    train, val = [], []
    for row in rows:
        unique = all(counts[pair] == 1 for pair in pairs_of(row))
        (val if unique and len(val) < VAL_ROWS else train).append(row)
    return train, val


def identity(seed: int) -> list[dict]:
    """Who are you, who made you, what can you do: a small file to give a model its name."""
    rows = []
    for lang in ("zh", "en"):
        rng = Random(f"{seed} identity {lang}")
        names = TEXT[f"core.{lang}"][0 if lang == "zh" else 2]
        for row in [names, *TEXT[f"identity.{lang}"]]:
            for ask in row["q"].strip("[]").split("|"):
                rows.append(messages([(ask, spin(rng, row["a"]))], None))
    Random(f"{seed} identity order").shuffle(rows)
    return rows
