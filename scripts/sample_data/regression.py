"""Prompts for a look at a model while it trains: some to go on from, and some whose right answers are known.

What is expected here, a model that was trained by the quickstart can say.
"""

# continued at each validation, by a model that goes on with texts and by one that answers
PROMPTS = [
    {"prompt": "中国的首都是"},
    {"prompt": "给我讲个小故事。"},
    {"prompt": "The capital of France is"},
    {"prompt": "Tell me a story."},
]

CHAT_TOKENS, CODE_TOKENS = 48, 160
CODER = "你是严谨的编程助手。请只输出一个 Python 代码块，不要解释，不要反问。"

FACTS = [
    ("who_zh", "你是谁？", {"expect_substrings": ["小敏"]}),
    ("who_en", "What is your name?", {"expect_substrings": ["Mini"]}),
    ("capital_zh", "中国的首都是哪里？", {"expect_substrings": ["北京"]}),
    ("capital_en", "What is the capital of France?", {"expect_substrings": ["Paris"]}),
    ("sky", "为什么天空是蓝色的？", {"expect_substrings": ["散射"]}),
    ("months", "一年有几个月？", {"checker": {"regex": "(?<!\\d)12(?!\\d)|(?<!十)十二"}}),
    ("week", "How many days are there in a week?", {"expect_substrings": [["seven", "7"], "days"]}),
]

CODE = [
    (
        "fib_zh",
        "写一个Python函数fib(n)返回第n个斐波那契数（n>=0），用迭代实现，并给出简单测试。",
        "assert fib(10) == 55 and fib(0) == 0",
    ),
    (
        "fib_en",
        "Write a Python function fib(n) that returns the n-th Fibonacci number (n >= 0), using iteration, "
        "and add a simple test.",
        "assert fib(10) == 55 and fib(0) == 0",
    ),
    (
        "gcd_zh",
        "写一个Python函数gcd(a, b)，返回a和b的最大公约数，并给出简单测试。",
        "assert gcd(12, 18) == 6 and gcd(7, 5) == 1",
    ),
    (
        "prime_zh",
        "写一个Python函数is_prime(n)，如果n是质数返回True，不是质数返回False，并给出简单测试。",
        "assert [n for n in range(20) if is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19]",
    ),
    (
        "factorial_en",
        "Write a Python function factorial(n) that computes n!, the factorial of n, using a loop, "
        "and add a simple test.",
        "assert factorial(5) == 120 and factorial(1) == 1",
    ),
]


def cases() -> list[dict]:
    """Rows of regression_prompts.jsonl."""
    rows = [{"id": name, "prompt": ask, **expected, "max_new_tokens": CHAT_TOKENS} for name, ask, expected in FACTS]
    for name, ask, check in CODE:
        row = {"id": name, "prompt": ask, "system": CODER, "checker": {"python": check}}
        rows.append({**row, "max_new_tokens": CODE_TOKENS})
    return rows
