"""Texts about numbers: sums in words and signs, word problems with solutions, units, the calendar; all computed."""

from random import Random

from scripts.sample_data.writing import article, join, listing, load, some, spin

TEXT = load("numbers")
PEOPLE = load("world")
SIGNS = {"+": ("加", "plus"), "-": ("减", "minus"), "×": ("乘", "times"), "÷": ("除以", "divided by")}
DAYS_ZH = [f"星期{day}" for day in "一二三四五六日"]
DAYS_EN = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS_EN = "January February March April May June July August September October November December".split()
LENGTHS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]


def operation(rng: Random, sign: str, top: int = 100) -> tuple[int, int, int]:
    """Two numbers and the result, whole and not negative."""
    if sign == "+":
        a, b = rng.randint(1, top), rng.randint(1, top)
        return a, b, a + b
    if sign == "-":
        a = rng.randint(2, top)
        b = rng.randint(1, a)
        return a, b, a - b
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    return (a, b, a * b) if sign == "×" else (a * b, b, a)


def in_words(rng: Random, lang: str, sign: str, values: tuple[int, int, int]) -> str:
    """One sum as a sentence."""
    a, b, result = values
    if lang == "zh":
        return spin(
            rng, "[{a}{w}{b}等于{r}|{a}{w}{b}得{r}|{a} {s} {b} = {r}]", a=a, b=b, r=result, w=SIGNS[sign][0], s=sign
        )
    pattern = "[{a} {w} {b} is {r}|{a} {w} {b} equals {r}|{a} {s} {b} = {r}]"
    return spin(rng, pattern, a=a, b=b, r=result, w=SIGNS[sign][1], s=sign)


def sums(rng: Random, lang: str, sign: str) -> str:
    """Several sums of one sort."""
    top = rng.choice([10, 20, 100, 100])
    texts = [in_words(rng, lang, sign, operation(rng, sign, top)) for _ in range(rng.randint(4, 9))]
    if lang == "zh":
        start = "[我们来做几道{w}法题。|算一算：|口算练习：|数学课上，同学们一起算题。]"
        word = {"+": "加", "-": "减", "×": "乘", "÷": "除"}[sign]
        return spin(rng, start, w=word) + "，".join(texts) + "。"
    name = {"+": "addition", "-": "subtraction", "×": "multiplication", "÷": "division"}[sign]
    start = "[here are some examples of {n}.|let us practise {n}.|in the lesson we did some {n}.|simple {n}:]"
    return join("en", [spin(rng, start, n=name), "; ".join(texts) + "."])


def carrying(rng: Random, lang: str, sign: str) -> str:
    """One bigger addition or subtraction explained step by step."""
    a, b = rng.randint(21, 89), rng.randint(11, 89)
    if sign in "-÷":
        a, b = max(a, b) + 10, min(a, b)
        tens, ones = b // 10 * 10, b % 10
        middle, result = a - tens, a - b
        word_zh, word_en, mark = "减去", "take away", "-"
    else:
        tens, ones = b // 10 * 10, b % 10
        middle, result = a + tens, a + b
        word_zh, word_en, mark = "加上", "add", "+"
    if lang == "zh":
        return (
            f"怎样口算{a} {mark} {b}？可以把{b}分成{tens}和{ones}。先{word_zh}{tens}：{a} {mark} {tens} = {middle}；"
            f"再{word_zh}{ones}：{middle} {mark} {ones} = {result}。所以{a} {mark} {b} = {result}。"
        )
    return (
        f"How can we work out {a} {mark} {b} in the head? Split {b} into {tens} and {ones}. First {word_en} {tens}: "
        f"{a} {mark} {tens} = {middle}. Then {word_en} {ones}: {middle} {mark} {ones} = {result}. "
        f"So {a} {mark} {b} = {result}."
    )


def drawn(rng: Random, row: dict) -> dict[str, int]:
    """Numbers for a word problem and its result by the rule of the table."""
    low, high = map(int, row["range"].split())
    a, b, c = (rng.randint(low, high) for _ in range(3))
    rule = row["rule"]
    if rule == "a-b":
        a, b = max(a, b) + 1, min(a, b)
    if rule == "a/b":
        a = a * b
    if rule == "a+b-c":
        c = min(c, a + b)
    results = {"a+b": a + b, "a-b": a - b, "a*b": a * b, "a/b": a // b, "a+b+c": a + b + c, "a+b-c": a + b - c}
    return {"a": a, "b": b, "c": c, "r": results.get(rule, a * b + c)}


def problem(rng: Random, lang: str, row: dict) -> str:
    """One word problem with its solution, or two of them."""
    rows = [row] if rng.random() < 0.6 else [row, rng.choice(TEXT["problems"])]
    texts = []
    for chosen in rows:
        thing = rng.choice(TEXT["things"])
        who = rng.choice(PEOPLE[f"names.{lang}"])
        texts.append(spin(rng, chosen[lang], who=who, thing=thing["zh"], things=thing["many"], **drawn(rng, chosen)))
    return "\n".join(texts)


def units(rng: Random, lang: str, row: dict) -> str:
    """How many of the small unit make the big one, and examples."""
    factor = int(row["factor"])
    numbers = sorted(rng.sample(range(2, 13), rng.randint(1, 3)))
    if lang == "zh":
        big, small = row["big_zh"], row["small_zh"]
        start = f"1{big}等于{factor}{small}，" if big[0] != "个" else f"一{big}等于{factor}{small}，"
        return (
            start + "，".join(f"{n}{big}等于{n * factor}{small}" for n in numbers) + "。" + extra_zh(rng, row, factor)
        )
    texts = [f"{n} {row['bigs_en']} are {n * factor} {row['smalls_en']}" for n in numbers]
    first = "an hour" if row["big_en"] == "hour" else article(row["big_en"])
    return join("en", [f"{first} has {factor} {row['smalls_en']}.", "; ".join(texts) + "."])


def extra_zh(rng: Random, row: dict, factor: int) -> str:
    n = rng.randint(2, 20)
    text = f"反过来，{n * factor}{row['small_zh']}就是{n}{row['big_zh']}。"
    return text if rng.random() < 0.6 else ""


def calendar(rng: Random, lang: str, month: int) -> str:
    """A month with its length and neighbours, or the days of the week."""
    day, days = rng.randrange(7), rng.randint(2, 6)
    before, after = (month - 1) % 12, (month + 1) % 12
    if lang == "zh":
        length = "平年有28天，闰年有29天" if month == 1 else f"有{LENGTHS[month]}天"
        week = f"今天是{DAYS_ZH[day]}，昨天是{DAYS_ZH[day - 1]}，明天是{DAYS_ZH[(day + 1) % 7]}，"
        week += f"{days}天以后是{DAYS_ZH[(day + days) % 7]}。"
        text = f"{month + 1}月{length}，前一个月是{before + 1}月，后一个月是{after + 1}月。"
        facts = ["一年有12个月。", "一个星期有7天。", "平年有365天，闰年有366天。", "一天有24小时。", week]
        return "".join([text, *some(rng, facts, 1, 3)])
    length = "28 days, or 29 in a leap year" if month == 1 else f"{LENGTHS[month]} days"
    week = f"If today is {DAYS_EN[day]}, tomorrow is {DAYS_EN[(day + 1) % 7]} and yesterday was {DAYS_EN[day - 1]}."
    later = f"{days} days after {DAYS_EN[day]} it is {DAYS_EN[(day + days) % 7]}."
    text = f"{MONTHS_EN[month]} is month number {month + 1} and has {length}."
    near = f"It comes after {MONTHS_EN[before]} and before {MONTHS_EN[after]}."
    facts = ["A year has 12 months.", "There are seven days in a week.", "A day has 24 hours.", week, later, near]
    return " ".join([text, *some(rng, facts, 2, 4)])


def table_of(rng: Random, lang: str, n: int) -> str:
    """The multiplication table of one number, or a row of its multiples."""
    stop = rng.randint(7, 12)
    first = rng.randint(1, 3)
    if lang == "zh":
        text = "，".join(f"{n} × {i} = {n * i}" for i in range(first, stop + 1))
        return spin(rng, "[{n}的乘法表：|把{n}乘以几个数：|背一背{n}的乘法：]", n=n) + text + "。"
    text = ", ".join(f"{n} × {i} = {n * i}" for i in range(first, stop + 1))
    return spin(rng, "[The table of {n}: |Multiplying by {n}: |Learn the table of {n} by heart: ]", n=n) + text + "."


def ordering(rng: Random, lang: str, count: int) -> str:
    """Numbers compared, ordered, counted, sorted into even and odd."""
    values = rng.sample(range(1, 100), count)
    up = sorted(values)
    even, odd = [v for v in up if v % 2 == 0], [v for v in up if v % 2]
    step, start = rng.randint(2, 9), rng.randint(1, 20)
    row = [start + step * i for i in range(5)]
    if lang == "zh":
        shown = "、".join(map(str, values))
        facts = [
            f"从小到大排列是{'、'.join(map(str, up))}。",
            f"其中最大的是{up[-1]}，最小的是{up[0]}。",
            f"{'、'.join(map(str, even))}是偶数。" if even else "里面没有偶数。",
            f"{'、'.join(map(str, odd))}是奇数。" if odd else "里面没有奇数。",
            f"它们的和是{sum(up)}。",
        ]
        more = f"再看一列数：{'、'.join(map(str, row))}，每个数都比前一个大{step}，下一个数是{row[-1] + step}。"
        return f"有{count}个数：{shown}。" + "".join(some(rng, facts, 2, 4)) + (more if rng.random() < 0.5 else "")
    facts = [
        f"In order they are {listing(list(map(str, up)), 'en')}.",
        f"The largest is {up[-1]}, and the smallest is {up[0]}.",
        f"Even numbers among them: {', '.join(map(str, even))}." if even else "None of them is even.",
        f"Odd numbers among them: {', '.join(map(str, odd))}." if odd else "None of them is odd.",
        f"Their sum is {sum(up)}.",
    ]
    more = (
        f"Another row: {', '.join(map(str, row))}. Each number is {step} more than the last; {row[-1] + step} is next."
    )
    texts = [f"Look at these numbers: {', '.join(map(str, values))}.", *some(rng, facts, 2, 4)]
    return " ".join(texts + ([more] if rng.random() < 0.5 else []))


KINDS = [
    ("sums", sums, list("+-×÷"), 3),
    ("carrying", carrying, list("+-"), 1.5),
    ("problem", problem, TEXT["problems"], 5),
    ("units", units, TEXT["units"], 1.5),
    ("calendar", calendar, list(range(12)), 1.5),
    ("table", table_of, list(range(2, 21)), 0.8),
    ("ordering", ordering, [3, 4, 5, 6], 2),
]
