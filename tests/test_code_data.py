"""The synthetic code data: enough distinct rows, every answer runs, and nothing of the evaluation's unseen half."""

import ast
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import ROOT, run_script
from model.sandbox import extract_code, run_python
from scripts import generate_code_sft as generator
from scripts.code_tasks import FORMS, KINDS, PICKS, POWERS, TASKS

SCRIPT = ROOT / "scripts" / "generate_code_sft.py"
EVAL_FILE = ROOT / "dataset" / "sample" / "code_eval.jsonl"
N = 5000
FIB_QUERY = "写一个Python函数fib(n)返回第n个斐波那契数（n>=0），用迭代实现，并给出简单测试。"


@pytest.fixture(scope="module")
def rows():
    return list(generator.make_rows(N, seed=42))


def prompt_of(row):
    return row["conversations"][-2]["content"]


def answer_of(row):
    return row["conversations"][-1]["content"]


class Renamer(ast.NodeTransformer):
    """Gives every name that the program itself binds (functions, arguments, variables) a number by first use."""

    def __init__(self, tree):
        bound = []
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                bound.append(node.name)
            elif isinstance(node, ast.arg):
                bound.append(node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                bound.append(node.id)
        self.names = {name: f"v{i}" for i, name in enumerate(dict.fromkeys(bound))}

    def visit_FunctionDef(self, node):
        node.name = self.names[node.name]
        return self.generic_visit(node)

    def visit_arg(self, node):
        node.arg = self.names[node.arg]
        return node

    def visit_Name(self, node):
        node.id = self.names.get(node.id, node.id)
        return node


def normalized(code, functions_only=False):
    """The code with its own names numbered; and the names that it had."""
    tree = ast.parse(code)
    if functions_only:
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    renamer = Renamer(tree)
    return ast.unparse(renamer.visit(tree)), renamer.names


def normalized_prompt(prompt, names):
    """The prompt with the names of the answer's code numbered."""
    if not names:
        return prompt
    pattern = r"(?<![A-Za-z0-9_])(" + "|".join(map(re.escape, names)) + r")(?![A-Za-z0-9_])"
    return re.sub(pattern, lambda match: names[match[0]], prompt)


def test_normalizing_ignores_names_but_not_constants_or_structure():
    first, names = normalized("def f(x):\n    y = x * 2\n    return len(y)")
    assert set(names) == {"f", "x", "y"}  # not len: it is not the program's own
    assert first == normalized("def other(a):\n    b = a * 2\n    return len(b)")[0]
    assert first != normalized("def f(x):\n    y = x * 3\n    return len(y)")[0]
    assert first != normalized("def f(x):\n    y = x * 2\n    return max(y)")[0]
    assert normalized_prompt("写函数f(x)，off f_x", {"f": "v0", "x": "v1"}) == "写函数v0(v1)，off f_x"


def test_at_least_60_families_and_all_of_them_occur(rows):
    assert len({task.key for task in TASKS}) == len(TASKS) >= 60
    drawn = {ask.task.key for _, ask in generator.make_asks(N, seed=42)}
    assert drawn == {task.key for task in TASKS}


def test_enough_distinct_prompts_and_answers_names_not_counted(rows):
    prompts, answers = set(), set()
    for row in rows:
        code, names = normalized(extract_code(answer_of(row)))
        answers.add(code)
        prompts.add(normalized_prompt(prompt_of(row), names))
    assert len(prompts) >= 4500, len(prompts)
    assert len(answers) >= 1500, len(answers)


def test_row_format_and_systems(rows):
    systems = []
    for row in rows:
        assert list(row) == ["conversations"]
        roles = [turn["role"] for turn in row["conversations"]]
        assert roles in (["system", "user", "assistant"], ["user", "assistant"])
        assert all(set(turn) == {"role", "content"} and turn["content"] for turn in row["conversations"])
        assert re.fullmatch(r"```python\n.+\n```", answer_of(row), re.DOTALL) and answer_of(row).count("```") == 2
        systems.append(row["conversations"][0]["content"] if len(roles) == 3 else "")
    shares = {system: systems.count(system) / N for system in set(systems)}
    assert set(shares) == {generator.CODE_SYSTEM, generator.CODE_SYSTEM_EN, ""}
    assert 0.7 < shares[generator.CODE_SYSTEM] < 0.8 and min(shares.values()) > 0.07
    chinese = sum(bool(re.search(r"[\u4e00-\u9fff]", prompt_of(row))) for row in rows) / N
    assert 0.5 < chinese < 0.6


def test_no_placeholder_is_left_and_the_prompt_names_the_function(rows):
    for row in rows:
        prompt, code = prompt_of(row), extract_code(answer_of(row))
        assert "$" not in prompt + code and "{'" not in prompt
        function = ast.parse(code).body[0]
        assert isinstance(function, ast.FunctionDef)
        assert f"{function.name}({', '.join(arg.arg for arg in function.args.args)})" in prompt
        assert 'if __name__ == "__main__":\n    print(' in code


def test_answers_are_short(rows):
    lengths = [len(answer_of(row)) for row in rows]
    assert sum(lengths) / N < 220 and max(lengths) < 600


def test_answers_are_short_in_tokens(rows):
    if not (ROOT / "model" / "tokenizer.json").exists():
        pytest.skip("no tokenizer is shipped yet")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model")
    lengths = [len(tokenizer(answer_of(row)).input_ids) for row in rows[:1000]]
    assert sum(lengths) / len(lengths) < 130 and max(lengths) <= 250


def test_fibonacci_is_frequent_in_both_languages_and_always_the_same_function(rows):
    fib = [row for row in rows if "def fib(n):" in answer_of(row)]
    assert len(fib) >= 0.03 * N
    bodies = {normalized(extract_code(answer_of(row)), functions_only=True)[0] for row in fib}
    assert len(bodies) == 1
    prompts = {prompt_of(row) for row in fib}
    assert FIB_QUERY in prompts
    chinese = [prompt for prompt in prompts if "斐波那契" in prompt]
    assert len(chinese) > 50 and len(prompts) - len(chinese) > 50


@pytest.mark.long
def test_every_distinct_answer_runs(rows):
    assert generator.verify(rows) >= 1500


def test_one_answer_of_each_family_runs(rows):
    answers = {ask.task.key: generator.code_of(ask) for _, ask in generator.make_asks(N, seed=1)}
    with ThreadPoolExecutor(2) as pool:
        for code, result in zip(answers.values(), pool.map(run_python, answers.values()), strict=True):
            assert result.ok and result.stdout.strip(), code + result.stderr


def test_functions_of_all_families_give_the_right_results():
    """Hand-worked values, one for each family, against the code of some question of that family."""
    expected = {
        "fib": ({}, "f(0), f(1), f(10), f(20)", (0, 1, 55, 6765)),
        "factorial": ({}, "f(0), f(5)", (1, 120)),
        "gcd": ({}, "f(12, 18), f(7, 5)", (6, 1)),
        "power_kind": ({"power": POWERS[2], "kind": KINDS[1]}, "f(4)", ([1, 81],)),
        "pick_form": ({"pick": PICKS[3], "form": FORMS[3]}, "f(['One', 'To'])", ("oT",)),
        "lcm": ({}, "f(4, 6)", (12,)),
        "is_prime": ({}, "f(1), f(2), f(9), f(13)", (False, True, False, True)),
        "primes": ({"limit": 20}, "f()", ([2, 3, 5, 7, 11, 13, 17, 19],)),
        "linear": ({"a": 4, "b": 7}, "f(3)", (19,)),
        "multiples": ({"k": 9, "limit": 30}, "f()", ([9, 18, 27],)),
        "sum_multiples": ({"k": 5, "limit": 20}, "f()", (30,)),
        "clamp": ({"low": 1, "high": 8}, "f(0), f(4), f(9)", (1, 4, 8)),
        "fizzbuzz": ({"a": 2, "b": 5}, "f(10)[-2:], f(5)", (["9", "FizzBuzz"], ["1", "Fizz", "3", "Fizz", "Buzz"])),
        "two_sum": ({}, "f([2, 7, 11, 15], 9), f([3, 3], 6), f([1], 2)", ([0, 1], [0, 1], [])),
        "binary_search": ({}, "f([1, 3, 5], 5), f([1, 3, 5], 4), f([], 1)", (2, -1, -1)),
        "dedup": ({}, "f([2, 1, 2, 3, 1])", ([2, 1, 3],)),
        "bubble_sort": ({}, "f([3, 1, 2]), f([])", ([1, 2, 3], [])),
        "collatz": ({}, "f(1), f(6)", (0, 8)),
        "is_leap": ({}, "f(1900), f(2000), f(2024), f(2023)", (False, True, True, False)),
        "c_to_f": ({"d": 1}, "f(37)", (98.6,)),
        "f_to_c": ({"d": 1}, "f(212)", (100.0,)),
        "running_sum": ({}, "f([1, 2, 3])", ([1, 3, 6],)),
        "transpose": ({}, "f([[1, 2], [3, 4]])", ([[1, 3], [2, 4]],)),
        "rotate": ({"k": 2}, "f([1, 2, 3, 4])", ([3, 4, 1, 2],)),
        "chunk": ({"k": 2}, "f([1, 2, 3])", ([[1, 2], [3]],)),
        "word_freq": ({}, "f('a b a')", ({"a": 2, "b": 1},)),
        "caesar": ({"k": 3}, "f('xyz')", ("abc",)),
        "count_vowels": ({}, "f('HellO')", (2,)),
        "reverse_words": ({}, "f('one two')", ("two one",)),
        "is_palindrome": ({}, "f('level'), f('ab')", (True, False)),
        "arithmetic": ({"a": 2, "d": 3}, "f(1), f(4)", (2, 11)),
        "discount": ({"p": 25}, "f(80)", (60.0,)),
        "sum_range": ({"a": 1, "b": 100}, "f()", (5050,)),
        "countdown": ({"k": 3}, "f(10)", ([10, 7, 4, 1],)),
    }
    tasks = {task.key: task for task in TASKS}
    assert set(expected) <= set(tasks)
    checks = []
    for key, (params, calls, values) in expected.items():
        ask = generator.Ask(tasks[key], params, "zh", 0, "", "", "", "f")
        checks.append(
            f"{generator.code_of(ask)}\nresults = ({calls},)\nassert results == {values!r}, ({key!r}, results)"
        )
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(run_python, checks):
            assert result.ok, result.stderr


# --- the evaluation's prompts ---


def test_eval_file_is_the_committed_output_of_the_generator(tmp_path):
    finished = run_script(SCRIPT, "--eval_out", tmp_path / "eval.jsonl")
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "eval.jsonl").read_bytes() == EVAL_FILE.read_bytes()


def test_eval_rows_are_five_seen_and_five_unseen():
    rows = [json.loads(line) for line in EVAL_FILE.read_text(encoding="utf-8").splitlines()]
    assert [row["seen"] for row in rows] == [True] * 5 + [False] * 5
    assert rows[0]["prompt"] == FIB_QUERY
    assert "fib(n)" in rows[1]["prompt"] and rows[1]["prompt"].isascii()
    assert all(set(row) == {"prompt", "system", "check", "seen"} for row in rows)
    assert {row["system"] for row in rows} == {generator.CODE_SYSTEM}
    assert len({row["prompt"] for row in rows}) == 10


@pytest.mark.parametrize("seed", [0, 1, 7, 42, 1234])
def test_seen_prompts_occur_and_unseen_ones_never_do(seed):
    """Neither as a prompt nor as a wording."""
    pairs = list(generator.make_asks(N, seed))
    prompts = {generator.prompt_of(ask) for _, ask in pairs}
    assert {generator.prompt_of(ask) for ask, _ in generator.seen_asks()} <= prompts
    for unseen, _ in generator.unseen_asks():
        assert generator.prompt_of(unseen) not in prompts
        assert not any(unseen.text in prompt for prompt in prompts)


WRONG = {
    "fib": "def fib(n):\n    a, b = 1, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a",
    "gcd": "def gcd(a, b):\n    return min(a, b)",
    "reverse_string": "def reverse_string(s):\n    return s",
    "sum_digits": "def sum_digits(n):\n    return len(str(n))",
    "count_vowels": "def count_vowels(s):\n    return sum(1 for c in s if c in 'aeiou')",
    "is_prime": "def is_prime(n):\n    return n % 2 == 1",
    "factorial": "def factorial(n):\n    result = 1\n    for i in range(2, n):\n        result *= i\n    return result",
}


@pytest.mark.parametrize("number", range(10))
def test_check_passes_the_reference_and_fails_a_wrong_answer(number):
    ask, check = (generator.seen_asks() + generator.unseen_asks())[number]
    assert run_python(f"{generator.code_of(ask)}\n{check}").ok
    assert run_python(f"{WRONG[ask.task.key]}\n").ok
    wrong = run_python(f"{WRONG[ask.task.key]}\n{check}")
    assert not wrong.ok and "AssertionError" in wrong.stderr
    assert not run_python(f"pass\n{check}").ok


# --- the command line ---


def test_same_seed_gives_the_same_bytes_whatever_the_hash_seed(tmp_path):
    outputs = []
    for number, (seed, hash_seed) in enumerate([(42, "0"), (42, "123"), (43, "0")]):
        out = tmp_path / f"{number}.jsonl"
        finished = run_script(SCRIPT, "--out", out, "--n", 300, "--seed", seed, env={"PYTHONHASHSEED": hash_seed})
        assert finished.returncode == 0, finished.stderr
        outputs.append(out.read_bytes())
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0].count(b"\n") == 300 and b"\r" not in outputs[0]


def test_bare_file_name_new_folder_and_default_count(tmp_path):
    finished = run_script(SCRIPT, "--out", "code.jsonl", cwd=tmp_path)
    assert finished.stdout.strip() == "Saved 5000 code SFT samples -> code.jsonl"
    lines = (tmp_path / "code.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5000 and "写一个" in "".join(lines)  # readable, not escaped
    assert [json.loads(line) for line in lines] == list(generator.make_rows(5000, 42))
    assert run_script(SCRIPT, "--out", "new/folder/code.jsonl", "--n", 3, cwd=tmp_path).returncode == 0
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["code.jsonl"]


def test_more_rows_than_distinct_prompts_of_a_family_still_works():
    assert sum(1 for _ in generator.make_rows(7000, seed=3)) == 7000


def test_verify_accepts_good_answers_and_names_a_bad_one(tmp_path):
    finished = run_script(SCRIPT, "--out", tmp_path / "c.jsonl", "--n", 20, "--verify")
    assert finished.returncode == 0 and "Verified: all" in finished.stdout
    broken = {"conversations": [{"role": "assistant", "content": "```python\nprint(1 / 0)\n```"}]}
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        generator.verify([broken])


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--out", "x.jsonl", "--n", "0"], "--n is 0"),
        (["--out", "x.jsonl", "--n", "-5"], "--n is -5"),
        (["--n", "5"], "--out FILE"),
        (["--out", "."], "is a folder"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(tmp_path, flags, reason):
    finished = run_script(SCRIPT, *flags, cwd=tmp_path)
    assert finished.returncode == 2 and reason in finished.stderr and "Traceback" not in finished.stderr
    assert not list(tmp_path.iterdir())
