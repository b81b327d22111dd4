"""The quickstart: how answers are judged, when it stops, when it says that the model learned nothing, and all of it."""

import json
import sys
from argparse import Namespace

import pytest
from inside import run_inside

from conftest import ROOT, run_script
from scripts import quickstart
from scripts.eval_answers import judge_chat, judge_code, refuse_seen

CHECK = "assert fib(10) == 55"
FIB = """\
def fib(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a
"""


# --- judging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "ran", "right", "error"),
    [
        (FIB, True, True, ""),
        (f"Here it is:\n```python\n{FIB}```\nHave fun.", True, True, ""),
        (f"```python\n{FIB.replace('range(n)', 'range(n - 1)')}```", True, False, "AssertionError"),
        (f"```python\n{FIB.replace('fib', 'other')}```", True, False, "NameError"),
        (f"```python\n{FIB}print(fib(3)\n```", False, False, "SyntaxError"),
        (f"```python\n{FIB}assert fib(3) == 3\n```", False, False, "AssertionError"),  # right, but its own test is not
        ("I would rather not.", False, False, "no code"),
        ("", False, False, "no code"),
        (
            f"```python\n{FIB}raise SystemExit(0)\n```",
            True,
            False,
            "before the check",
        ),
    ],
)
def test_judge_code(answer, ran, right, error):
    verdict = judge_code(answer, CHECK)
    assert (verdict["ran"], verdict["right"]) == (ran, right)
    assert error in verdict["error"] and bool(verdict["error"]) == bool(error)


@pytest.mark.slow
def test_judge_code_ends_an_endless_loop():
    verdict = judge_code(f"```python\n{FIB}while True:\n    pass\n```", CHECK)
    assert verdict["ran"] is verdict["right"] is False and "not done after" in verdict["error"]


def test_judge_chat():
    assert judge_chat("The capital is PARIS.", [["paris", "巴黎"]])["right"]
    assert judge_chat("巴黎在法国。", [["paris", "巴黎"], ["france", "法国"]])["right"]
    assert not judge_chat("巴黎。", [["paris", "巴黎"], ["france", "法国"]])["right"]
    assert not judge_chat("", [["paris"]])["right"]


def test_questions_that_should_be_new_are_looked_for(tmp_path):
    path = tmp_path / "mix.jsonl"
    turns = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "second"}]
    path.write_text("{}\n" + json.dumps({"conversations": turns}) + "\n", encoding="utf-8")
    refuse_seen([{"prompt": "first", "seen": True}, {"prompt": "first"}, {"prompt": "other", "seen": False}], path)
    refuse_seen([{"prompt": "second", "seen": False}], path)  # a reply is no prompt
    with pytest.raises(ValueError, match="mix.jsonl:2 holds 'first'"):
        refuse_seen([{"prompt": "other", "seen": False}, {"prompt": "first", "seen": False}], path)


def test_evaluation_refuses_a_question_that_was_trained(tmp_path):
    """Before it loads any weights, so that a spoiled evaluation cannot be overlooked."""
    rows = [
        json.loads(line) for line in (ROOT / "dataset/sample/code_eval.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    new = next(row["prompt"] for row in rows if not row["seen"])
    path = tmp_path / "mix.jsonl"
    turns = [{"role": "user", "content": new}, {"role": "assistant", "content": "a"}]
    path.write_text(json.dumps({"conversations": turns}, ensure_ascii=False), encoding="utf-8")
    done = run_inside("scripts/eval_answers.py", "--train_path", path, "--save_dir", tmp_path)
    assert done.returncode == 2 and "should be new to the model" in done.stderr


# --- the verdict ------------------------------------------------------------------------------------------------------

GOOD = {"code": 10, "code_ran": 10, "code_right": 9, "code_new": 5, "code_new_right": 4, "chat": 5, "chat_right": 4}


def results(folder, loss=4.0, fibonacci=(True, True), **summary):
    """The files that the steps leave, made by hand."""
    (folder / "quickstart").mkdir(parents=True)
    numbers = {"tokens_per_second": 1000.0, "loss": loss, "val_loss": loss, "val_ppl": 50.0}
    for name in ("pretrain", "full_sft"):
        (folder / f"{name}_256.json").write_text(json.dumps({"metrics": numbers}), encoding="utf-8")
    right = [*fibonacci, *[True] * 8]
    answers = [{"kind": "code", "prompt": str(i), "right": r, "ran": r} for i, r in enumerate(right)]
    content = {"summary": {**GOOD, **summary}, "answers": answers}
    (folder / "quickstart/answers.json").write_text(json.dumps(content), encoding="utf-8")


FAILURES = {
    "Chinese Fibonacci": {"fibonacci": (False, True)},
    "English Fibonacci": {"fibonacci": (True, False)},
    "code": {"code_right": 8},
    "chat": {"chat_right": 3},
    "pretraining": {"loss": 9.0},  # above the entropy of any distribution over 6400 tokens
}


def test_report_of_a_model_that_learned(tmp_path, capsys):
    results(tmp_path / "out")
    assert quickstart.report(Namespace(out_dir=tmp_path / "out"), {"pretrain": 120.0, "sft": 60.0}, 0.0)
    text = capsys.readouterr().out
    for words in (
        "pretrain: 2.0 min",
        "sft: 1.0 min",
        "1,000 trained tokens/s",
        "held-back loss 4.000",
        "perplexity 50.00",
    ):
        assert words in text
    assert "9 of 10 right" in text and "4 of 5 right" in text and "FAILED" not in text


@pytest.mark.parametrize("failure", FAILURES)
def test_report_of_a_model_that_did_not(failure, tmp_path, capsys):
    results(tmp_path / "out", **FAILURES[failure])
    assert not quickstart.report(Namespace(out_dir=tmp_path / "out"), {}, 0.0)
    assert capsys.readouterr().out.count("[FAILED]") == 1


@pytest.mark.parametrize(("summary", "status"), [({}, 0), ({"chat_right": 0}, 1)])
def test_status_follows_the_answers(summary, status, tmp_path, monkeypatch, capsys):
    results(tmp_path / "out", **summary)
    monkeypatch.setattr(quickstart, "run", lambda *command: 1.0)
    with pytest.raises(SystemExit) as end:
        quickstart.main(quickstart.parse_args(["--out_dir", str(tmp_path / "out"), "--steps", "answers"]))
    assert end.value.code == status and "eval_llm.py" in capsys.readouterr().out


def test_entropy_by_hand(tmp_path, tokenizer):
    """Four tokens, one of them twice among five."""
    words = [next(i for i in range(300 + k, 6400) if tokenizer.decode([i]).isalpha()) for k in range(0, 800, 200)]
    assert len(set(words)) == 4
    lines = [json.dumps({"text": tokenizer.decode([i])}) for i in [*words, words[0]]]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert quickstart.unigram_entropy(path) == pytest.approx(1.3321790, abs=1e-6)  # 0.4 ln 2.5 + 3 * 0.2 ln 5


# --- the commands -----------------------------------------------------------------------------------------------------


def test_unknown_step():
    done = run_inside("scripts/quickstart.py", "--steps", "data,dpo")
    assert done.returncode == 2 and "no step dpo: choose of data, pretrain, sft, answers" in done.stderr


def test_a_command_is_printed_as_it_can_be_typed(tmp_path, capfd):
    script = tmp_path / "say.py"
    script.write_text("import sys\nprint(sys.argv[1:])", encoding="utf-8")
    assert quickstart.run(str(script), "--text", "a b", "--path", ROOT / "model" / "chat.py") > 0
    out = capfd.readouterr().out
    assert f"$ python {script} --text 'a b' --path model/chat.py" in out.replace("\\", "/")
    assert "['--text', 'a b', '--path', 'model" in out


def test_a_command_that_fails_ends_it(tmp_path, capfd):
    script = tmp_path / "fail.py"
    script.write_text("import sys\nsys.exit(3)", encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        quickstart.run(str(script))
    assert end.value.code == 3 and "ended with status 3" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_command_that_is_killed_ends_it(tmp_path):
    script = tmp_path / "die.py"
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        quickstart.run(str(script))
    assert end.value.code not in (0, None)


@pytest.mark.slow
def test_a_stage_that_fails_ends_it(tmp_path):
    """No pretrained weights: the fine-tuning stops, and no later step runs."""
    done = run_script("scripts/quickstart.py", "--out_dir", tmp_path / "out", "--steps", "sft,answers")
    assert done.returncode == 2 and "error: no weights" in done.stderr and "stops here" in done.stderr
    assert "eval_answers" not in done.stdout and "What to type next" not in done.stdout


@pytest.mark.long
def test_whole_quickstart(tmp_path, monkeypatch):
    """From sample data to answers that run; on as many threads as a user has."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    done = run_script("scripts/quickstart.py", "--out_dir", tmp_path / "out", timeout=1500)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    scripts = "generate_sample_data generate_code_sft build_sft_mix train_pretrain train_full_sft eval_answers".split()
    printed = [line for line in done.stdout.splitlines() if line.startswith("$ python ")]
    assert len(printed) == len(scripts) and all(name in line for name, line in zip(scripts, printed, strict=True))
    assert done.stdout.count("[ok]") == 5 and "[FAILED]" not in done.stdout and "What to type next" in done.stdout
    answers = json.loads((tmp_path / "out/quickstart/answers.json").read_text(encoding="utf-8"))
    assert answers["summary"]["code"] == 10 and answers["summary"]["code_new"] >= 5 and answers["summary"]["chat"] == 5
