"""What a model says while it trains: the checkers, the files, and that asking leaves the training as it was."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from inside import run_inside

from conftest import ROOT, run_script
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import save_weights, weight_path
from trainer import regression
from trainer.regression import (
    ask,
    check_prompt_files,
    check_regression,
    judge,
    one_line,
    read_cases,
    read_prompts,
    run_cases,
    show_samples,
)

NEVER = {"regex": "(?!)"}


def config(**fields):
    return MiniMindConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, **fields)


def tiny(seed=0, **fields):
    torch.manual_seed(seed)
    return MiniMindForCausalLM(config(**fields)).train()


def case(name="a", prompt="你好", **more):
    row = {"id": name, "prompt": prompt, "max_new_tokens": 6, **more}
    return row if {"checker", "expect_substrings"} & set(more) else row | {"checker": {"regex": "(?s).*"}}


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


class Records:
    """Stands for the monitor: keeps what it is told."""

    def __init__(self):
        self.entries = []

    def record(self, line=None, **metrics):
        self.entries.append((line, metrics))


def fake_run(tmp_path, tokenizer, model, prompts=(), cases=(), **more):
    """What these functions know of a TrainRun."""
    samples, asked = "none", tmp_path / "cases.jsonl"
    if prompts:
        samples = str(write(tmp_path / "prompts.jsonl", *prompts))
    write(asked, *(cases or [case()]))
    args = SimpleNamespace(sample_prompts=samples, regression_eval=1, regression_prompts=str(asked))
    check_prompt_files(args)
    facts = {"due": {"val", "regression"}, "updates": 500, "folder": tmp_path / "run", "stopping": False}
    return SimpleNamespace(args=args, model=model, tokenizer=tokenizer, monitor=Records(), **{**facts, **more})


# --- judging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected, why",
    [
        ("It is PARIS.", {"expect_substrings": ["paris"]}, ""),
        ("It is Rome.", {"expect_substrings": ["Paris"]}, "lacks Paris"),
        ("seven days", {"expect_substrings": [["7", "seven"], "days"]}, ""),
        ("eight days", {"expect_substrings": [["7", "seven"], "days"]}, "lacks 7 or seven"),
        ("", {"expect_substrings": ["a", ["b"]]}, "lacks a, b"),
        ("6 + 9 = 15", {"checker": {"regex": r"= 15\b"}}, ""),
        ("6 + 9 = 151", {"checker": {"regex": r"= 15\b"}}, r"does not match = 15\b"),
        ("a" * 4000 + "b", {"checker": {"regex": "b"}}, "does not match b"),  # behind what is looked at
        ("a", {"checker": {"regex": "b"}, "expect_substrings": ["c"]}, "does not match b; lacks c"),
        ("a", {"checker": {"regex": "b"}, "expect_substrings": ["a"]}, "does not match b"),
        ("a", {"checker": {"substrings": ["a"]}}, ""),
        ("def f(x):\n    return 2 * x\n", {"checker": {"python": "assert f(2) == 4"}}, ""),
        ("```python\ndef f(x):\n    return x\n```", {"checker": {"python": "assert f(2) == 4"}}, "AssertionError"),
        ("I would rather not.", {"checker": {"python": "assert f(2) == 4"}}, "no code in the answer"),
    ],
)
def test_judge(text, expected, why):
    assert judge(text, expected) == {"passed": not why, "why": why}


def test_code_is_run_in_the_sandbox():
    """In this process it would end the test, and see what is in the environment."""
    code = "import os\nfound = len(os.environ)\ndef f():\n    return found\n"
    assert judge(code, {"checker": {"python": "assert f() <= 2"}})["passed"]
    assert "ended before the check" in judge("raise SystemExit(0)\n", {"checker": {"python": "assert True"}})["why"]


# --- files ------------------------------------------------------------------------------------------------------------

GOOD = {"id": "a", "prompt": "b", "expect_substrings": ["c"]}


@pytest.mark.parametrize(
    "row, reason",
    [
        ("{", "broken JSON"),
        ({**GOOD, "expected": ["c"]}, "unknown key: 'expected'"),
        ({"prompt": "b", "expect_substrings": ["c"]}, "no 'id'"),
        ({"id": "a", "expect_substrings": ["c"]}, "no 'prompt'"),
        ({**GOOD, "id": 3}, "'id' is a number"),
        ({**GOOD, "prompt": " "}, "'prompt' is blank"),
        ({**GOOD, "system": None}, "'system' is null"),
        ({"id": "a", "prompt": "b"}, "neither 'expect_substrings' nor 'checker'"),
        ({"id": "a", "prompt": "b", "checker": {}}, "neither 'expect_substrings' nor 'checker'"),
        ({**GOOD, "expect_substrings": []}, "no list with something in it"),
        ({**GOOD, "expect_substrings": "c"}, "no list with something in it"),
        ({**GOOD, "expect_substrings": ["c", ""]}, "an expected substring is blank"),
        ({**GOOD, "expect_substrings": [[]]}, "an expected substring is a list"),
        ({**GOOD, "expect_substrings": [["c", 1]]}, "an expected substring is a number"),
        ({**GOOD, "checker": "regex"}, "'checker' is no object"),
        ({**GOOD, "checker": {"regexp": "a"}}, "unknown checker: 'regexp'; use substrings, regex, python"),
        ({**GOOD, "checker": {"substrings": ["d"]}}, "doubled key"),
        ({**GOOD, "checker": {"regex": "("}}, "broken regex"),
        ({**GOOD, "checker": {"python": "assert f(1) =="}}, "broken Python"),
        ({**GOOD, "max_new_tokens": 0}, "'max_new_tokens' is 0"),
        ({**GOOD, "max_new_tokens": True}, "'max_new_tokens' is True"),
        ({**GOOD, "id": "first"}, "'first' is that of line 1 too"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path, row, reason):
    path = write(tmp_path / "cases.jsonl", {**GOOD, "id": "first"}, "", row)
    with pytest.raises(ValueError, match=r"cases\.jsonl:3: ") as error:
        read_cases(path)
    assert reason in str(error.value)


def test_good_rows_are_read_as_they_are(tmp_path):
    rows = [GOOD, {"id": "d", "prompt": "e", "checker": {"python": "assert f()"}, "system": "s", "max_new_tokens": 3}]
    assert read_cases(write(tmp_path / "cases.jsonl", *rows)) == rows
    assert read_prompts(write(tmp_path / "p.jsonl", {"prompt": "b"})) == [{"prompt": "b"}]
    with pytest.raises(ValueError, match=r"p\.jsonl:1: unknown key: 'text'"):
        read_prompts(write(tmp_path / "p.jsonl", {"text": "b"}))


def test_the_files_are_checked_at_the_start_as_far_as_they_are_used(tmp_path):
    good, bad = write(tmp_path / "good.jsonl", {"prompt": "b"}), write(tmp_path / "bad.jsonl", {"id": "a"})

    def check(samples, asked, evaluated):
        names = {"sample_prompts": str(samples), "regression_prompts": str(asked), "regression_eval": evaluated}
        check_prompt_files(SimpleNamespace(**names))

    check("none", tmp_path / "missing.jsonl", 0)
    check(good, bad, 0)
    with pytest.raises(FileNotFoundError, match="missing"):
        check(tmp_path / "missing.jsonl", bad, 0)
    with pytest.raises(FileNotFoundError, match="missing"):
        check("none", tmp_path / "missing.jsonl", 1)
    with pytest.raises(ValueError, match=r"bad\.jsonl:1"):
        check(good, bad, 1)


def test_a_file_counts_as_it_was_at_the_start_of_the_run(tmp_path, tokenizer, capsys):
    run = fake_run(tmp_path, tokenizer, tiny(), prompts=[{"prompt": "first"}])
    (tmp_path / "prompts.jsonl").unlink()
    write(tmp_path / "cases.jsonl", "{")
    show_samples(run, chat=False)
    check_regression(run, chat=False)
    assert "first" in capsys.readouterr().out and run.monitor.entries
    with pytest.raises(FileNotFoundError):  # the next run begins with what is there then
        check_prompt_files(run.args)


# --- asking -----------------------------------------------------------------------------------------------------------


def test_replies_are_greedy_and_the_same_each_time(tokenizer):
    model, cases = tiny(), [case("a"), case("b", "The capital of France is", max_new_tokens=9)]
    first, second = ([r["response"] for r in run_cases(model, tokenizer, cases, False)["results"]] for _ in range(2))
    assert first == second
    ids = [tokenizer.bos_token_id, *tokenizer("The capital of France is", add_special_tokens=False).input_ids]
    for _ in range(9):  # by hand, without a cache
        with torch.no_grad():
            ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
    new = ids[-9:]
    new = new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
    assert first[1] == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_a_chat_model_sees_a_conversation(tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(regression, "reply", lambda model, tokenizer, ids, n: seen.append((ids, n)) or ("", 0, 0.0))
    row = {"id": "a", "prompt": "Who?", "system": "Be short."}
    ask(None, tokenizer, row, True, 7)
    ask(None, tokenizer, {**row, "max_new_tokens": 3}, False, 7)
    (chat, chat_tokens), (plain, plain_tokens) = seen
    assert "Be short." in tokenizer.decode(chat) and tokenizer.decode(chat).rstrip().endswith("assistant")
    assert tokenizer.decode(plain) == tokenizer.bos_token + "Who?"
    assert (chat_tokens, plain_tokens) == (7, 3)


def test_counts(tokenizer):
    cases = [case("a"), case("b", checker=NEVER), case("c")]
    told = []
    found = run_cases(tiny(), tokenizer, cases, False, say=told.append)
    assert (found["passed"], found["total"], found["pass_rate"]) == (2, 3, 2 / 3)
    keys = ["id", "prompt", "response", "passed", "why", "seconds"]
    assert all(list(result) == keys for result in found["results"])
    assert [result["passed"] for result in found["results"]] == [True, False, True]
    assert ["[wrong] b" in text for text in told] == [False, True, False]


def test_a_stop_between_cases_abandons_all(tokenizer):
    signs = iter([False, False, True])
    told = []
    cases = [case(name) for name in "abcd"]
    assert run_cases(tiny(), tokenizer, cases, False, stop=lambda: next(signs), say=told.append) is None
    assert len(told) == 2


class Broken(Exception):
    pass


@pytest.mark.parametrize("ends", ["well", "with an exception", "by a stop"])
def test_modes_and_random_state_are_what_they_were(tokenizer, monkeypatch, ends):
    model = tiny(dropout=0.1)
    model.model.norm.eval()  # a part that a stage keeps apart
    modes = {name: module.training for name, module in model.named_modules()}
    assert set(modes.values()) == {True, False}

    def draw(*args):
        assert not any(module.training for module in model.modules())
        torch.rand(3)
        if ends == "with an exception":
            raise Broken
        return "reply"

    monkeypatch.setattr(regression, "ask", draw)
    state = torch.get_rng_state()
    signs = iter([False, ends == "by a stop"])
    try:
        run_cases(model, tokenizer, [case("a"), case("b")], False, stop=lambda: next(signs))
        assert ends != "with an exception"
    except Broken:
        assert ends == "with an exception"
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_compiled_for_a_reply_and_the_stance_is_what_it_was(tokenizer, monkeypatch, fails):
    model, compiled = tiny(), []
    model.model.layers[0].compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    if fails:
        monkeypatch.setattr(regression, "judge", lambda text, row: 1 / 0)

    def asked():
        try:
            run_cases(model, tokenizer, [case()], False)
        except ZeroDivisionError:
            assert fails

    ids = torch.ones(2, 5, dtype=torch.long)
    with torch.compiler.set_stance("force_eager"):
        asked()
        model(ids)
        assert not compiled
    asked()
    assert not compiled
    model(ids)
    assert compiled
    torch._dynamo.reset()


def train(model, run=None, steps=4):
    """A few steps with dropout; between them the model is asked, if there is a run."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(7)
    data = torch.Generator().manual_seed(1)
    for step in range(steps):
        ids = torch.randint(3, 6400, (2, 12), generator=data)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if run is not None:
            run.updates = step + 1
            show_samples(run, chat=True)
            check_regression(run, chat=True)
    return model.state_dict()


@pytest.mark.parametrize("moe", [False, True])
def test_a_training_is_the_same_bit_for_bit(tmp_path, tokenizer, moe):
    fields = {"dropout": 0.2, "use_moe": moe, "moe_intermediate_size": 32}
    alone, model = train(tiny(**fields)), tiny(**fields)
    prompts = [{"prompt": "你好"}, {"prompt": "The sun"}]
    run = fake_run(tmp_path, tokenizer, model, prompts, [case("a"), case("b", checker=NEVER)])
    asked = train(model, run)
    assert all(torch.equal(alone[name], asked[name]) for name in alone)
    assert len(run.monitor.entries) == 4 and len(list((tmp_path / "run/regression").iterdir())) == 4


# --- samples ----------------------------------------------------------------------------------------------------------


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_samples_are_printed_and_kept(tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(regression, "ask", lambda model, tokenizer, row, chat, n: f"{row['prompt']}\n\x1b[2J{chat}{n}")
    run = fake_run(tmp_path, tokenizer, tiny(), prompts=[{"prompt": "你好"}, {"prompt": "a\tb"}])
    show_samples(run, chat=True)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [r"sample: 你好 -> 你好\n\x1b[2JTrue48", r"sample: a\tb -> a\tb\n\x1b[2JTrue48"]
    assert lines(tmp_path / "run/samples.jsonl") == [
        {"update": 500, "prompt": "你好", "response": "你好\n\x1b[2JTrue48"},
        {"update": 500, "prompt": "a\tb", "response": "a\tb\n\x1b[2JTrue48"},
    ]


def test_samples_after_a_resume_take_the_place_of_those_before_it(tmp_path, tokenizer):
    run = fake_run(tmp_path, tokenizer, tiny(), prompts=[{"prompt": "a"}])
    for update in (100, 200, 300, 200):
        run.updates = update
        show_samples(run, chat=False)
    assert [row["update"] for row in lines(tmp_path / "run/samples.jsonl")] == [100, 200]


def test_samples_stop_between_prompts(tmp_path, tokenizer, monkeypatch):
    run = fake_run(tmp_path, tokenizer, tiny(), prompts=[{"prompt": "a"}, {"prompt": "b"}])
    monkeypatch.setattr(regression, "ask", lambda *args: setattr(run, "stopping", True) or "x")
    show_samples(run, chat=False)
    assert [row["prompt"] for row in lines(tmp_path / "run/samples.jsonl")] == ["a"]


@pytest.mark.parametrize("why", ["val not due", "no prompts", "no tokenizer", "another process"])
def test_no_samples(tmp_path, tokenizer, monkeypatch, why):
    run = fake_run(tmp_path, tokenizer, tiny(), prompts=[] if why == "no prompts" else [{"prompt": "a"}])
    if why == "another process":
        monkeypatch.setattr(regression, "is_main_process", lambda: False)
        run.folder = None
    run.due = {"regression"} if why == "val not due" else run.due
    run.tokenizer = None if why == "no tokenizer" else tokenizer
    show_samples(run, chat=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text, columns, shown",
    [
        ("a\r\nb\x00\x1b\u2028\u202e", 80, r"a\r\nb\x00\x1b\u2028\u202e"),
        ("abcdef", 6, "abcdef"),
        ("abcdefg", 6, "abc..."),
        ("中文中文", 8, "中文中文"),
        ("中文中文中", 8, "中文..."),
        ("a中文中文", 8, "a中文..."),
        ("aa中文中", 7, "aa中..."),
    ],
)
def test_one_line(text, columns, shown):
    assert one_line(text, columns) == shown


def test_a_terminal_without_chinese_ends_no_training(tmp_path, tokenizer, monkeypatch):
    run = fake_run(tmp_path, tokenizer, tiny(), prompts=[{"prompt": "你好é"}], cases=[case("名"), case("b")])
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(regression, "ask", lambda *args: "x")
    show_samples(run, chat=False)
    out.flush()
    assert out.buffer.getvalue().decode("cp1252").strip() == r"sample: \u4f60\u597dé -> x"


# --- regression in a run ----------------------------------------------------------------------------------------------


def check_with(run, monkeypatch, update, passing):
    """One check in which just these ids pass; returns the printed line."""
    monkeypatch.setattr(regression, "judge", lambda text, row: {"passed": row["id"] in passing, "why": ""})
    monkeypatch.setattr(regression, "ask", lambda *args: "x")
    run.updates = update
    check_regression(run, chat=True)
    return run.monitor.entries[-1][0]


def test_the_record_says_what_changed_since_the_last_check(tmp_path, tokenizer, monkeypatch):
    run = fake_run(tmp_path, tokenizer, tiny(), cases=[case(name) for name in "abcd"])
    assert check_with(run, monkeypatch, 500, "ab") == "regression: 2 of 4 passed"
    assert check_with(run, monkeypatch, 1000, "bcd") == "regression: 3 of 4 passed (new: c, d; lost: a)"
    assert check_with(run, monkeypatch, 10000, "bcd") == "regression: 3 of 4 passed"
    assert check_with(run, monkeypatch, 1000000, "bc") == "regression: 2 of 4 passed (lost: d)"
    # after a resume the check before it counts, not a later one of the run that was cut off
    assert check_with(run, monkeypatch, 1500, "abcd") == "regression: 4 of 4 passed (new: a)"
    assert run.monitor.entries[1][1] == {"regression_pass_rate": 0.75, "regression_passed": 3}
    found = json.loads((tmp_path / "run/regression/step_000500.json").read_text(encoding="utf-8"))
    assert (found["step"], found["passed"], found["total"], found["pass_rate"]) == (500, 2, 4, 0.5)
    assert [result["passed"] for result in found["results"]] == [True, True, False, False]


def test_a_case_that_is_new_in_the_file_has_not_changed(tmp_path, tokenizer, monkeypatch):
    run = fake_run(tmp_path, tokenizer, tiny(), cases=[case("a")])
    check_with(run, monkeypatch, 500, "")
    run.args = fake_run(tmp_path, tokenizer, run.model, cases=[case("a"), case("b"), case("c")]).args
    assert check_with(run, monkeypatch, 1000, "ab") == "regression: 2 of 3 passed (new: a)"


def test_many_changes_are_cut(tmp_path, tokenizer, monkeypatch):
    names = [f"n{i}" for i in range(11)]
    run = fake_run(tmp_path, tokenizer, tiny(), cases=[case(name) for name in names])
    check_with(run, monkeypatch, 500, [])
    line = check_with(run, monkeypatch, 1000, names)
    assert line.endswith("(new: n0, n1, n2, n3, n4, n5, n6, n7 and 3 more)")


def test_a_stop_leaves_no_half_of_a_check(tmp_path, tokenizer, monkeypatch):
    run = fake_run(tmp_path, tokenizer, tiny(), cases=[case("a"), case("b")])
    monkeypatch.setattr(regression, "ask", lambda *args: setattr(run, "stopping", True) or "x")
    check_regression(run, chat=False)
    assert not run.monitor.entries and not (tmp_path / "run").exists()


def test_only_the_main_process_asks_and_only_when_due(tmp_path, tokenizer, monkeypatch):
    run = fake_run(tmp_path, tokenizer, tiny(), due={"val"})
    check_regression(run, chat=False)
    run.due = {"regression"}
    with monkeypatch.context() as patch:
        patch.setattr(regression, "is_main_process", lambda: False)
        check_regression(run, chat=False)
    assert not run.monitor.entries
    check_regression(run, chat=False)
    assert run.monitor.entries


def test_an_error_while_asking_is_not_swallowed(tmp_path, tokenizer, monkeypatch):
    def broken(*args):
        raise RuntimeError("no answer")

    run = fake_run(tmp_path, tokenizer, tiny(), prompts=[{"prompt": "a"}])
    monkeypatch.setattr(regression, "reply", broken)
    for say in (show_samples, check_regression):
        with pytest.raises(RuntimeError, match="no answer"):
            say(run, chat=False)


def test_a_folder_that_cannot_be_written_warns(tmp_path, tokenizer, capsys):
    run = fake_run(tmp_path, tokenizer, tiny(), prompts=[{"prompt": "a"}])
    run.folder.write_text("a file where the folder should be", encoding="utf-8")
    show_samples(run, chat=False)
    check_regression(run, chat=False)
    out = capsys.readouterr().out
    assert out.count("could not be written") == 2 and "samples.jsonl" in out and "step_000500.json" in out
    assert run.monitor.entries[0][0] == "regression: 1 of 1 passed"


# --- the script -------------------------------------------------------------------------------------------------------


def save(folder, stage="Full SFT", name="full_sft"):
    save_weights(weight_path(folder, name, config()), tiny().state_dict(), config(), stage=stage)


def flags(tmp_path, *more):
    return ("--save_dir", tmp_path, "--prompts", tmp_path / "cases.jsonl", "--device", "cpu", *more)


@pytest.mark.slow
def test_script_as_a_user_runs_it(tmp_path):
    save(tmp_path)
    write(tmp_path / "cases.jsonl", case("yes"), case("no", checker=NEVER))
    script = ("scripts/run_regression.py", *flags(tmp_path, "--out", tmp_path / "report.json"))
    done = run_script(*script, "--min_pass_rate", 0.5, env={"LC_ALL": "C"})
    assert done.returncode == 0, done.stderr
    assert "[right] yes: 你好" in done.stdout and "[wrong] no: 你好" in done.stdout
    assert done.stdout.rstrip().endswith("1 of 2 right, pass rate 0.500")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["passed"] == 1 and [result["id"] for result in report["results"]] == ["yes", "no"]
    done = run_script(*script, "--min_pass_rate", 0.51)
    assert done.returncode == 1 and "below --min_pass_rate 0.51" in done.stderr
    write(tmp_path / "cases.jsonl", case("yes"), {"id": "no"})
    done = run_script(*script)
    assert done.returncode == 2 and "cases.jsonl:2: missing key" in done.stderr and "Traceback" not in done.stderr


def test_script_never_fails_by_the_pass_rate_unless_asked(tmp_path):
    save(tmp_path)
    write(tmp_path / "cases.jsonl", case("no", checker=NEVER))
    assert run_inside("scripts/run_regression.py", *flags(tmp_path)).returncode == 0
    write(tmp_path / "cases.jsonl", case("yes"))
    assert run_inside("scripts/run_regression.py", *flags(tmp_path, "--min_pass_rate", 1)).returncode == 0


def test_script_lets_a_pretrained_model_continue(tmp_path, tokenizer):
    save(tmp_path, "Pretrain", "pretrain")
    write(tmp_path / "cases.jsonl", case("a", "The sun"))
    done = run_inside("scripts/run_regression.py", *flags(tmp_path, "--weight", "pretrain", "--out", tmp_path / "r"))
    assert done.returncode == 0 and "continues the prompts" in done.stdout
    response = json.loads((tmp_path / "r").read_text(encoding="utf-8"))["results"][0]["response"]
    assert response == ask(tiny().eval(), tokenizer, case("a", "The sun"), chat=False, max_new_tokens=1)


@pytest.mark.parametrize(
    "more, said",
    [
        (("--min_pass_rate", "1.5"), "--min_pass_rate"),
        (("--min_pass_rate", "x"), "--min_pass_rate"),
        (("--weight", "none_such"), "no weights at"),
        (("--prompts", "none_such.jsonl"), "no file at"),
    ],
)
def test_script_ends_with_2_on_a_mistake(tmp_path, more, said):
    write(tmp_path / "cases.jsonl", case())
    done = run_inside("scripts/run_regression.py", *flags(tmp_path, *more))
    assert done.returncode == 2 and said in done.stderr


def test_the_sample_files_are_good():
    assert len(read_cases(ROOT / "dataset/sample/regression_prompts.jsonl")) >= 12
    assert len(read_prompts(ROOT / "dataset/sample/prompts.jsonl")) >= 3
