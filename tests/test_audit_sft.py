"""The audit: every figure against a count made another way, the draw, duplicates, faults, advice, files it writes."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from broken_files import broken_file, chat, every_broken_file, run_main, write_rows

from conftest import ROOT, run_script
from dataset.diagnosis import (
    Inspection,
    Signer,
    estimated_similarity,
    first_similar,
    inspect_rows,
    is_code,
    joined_columns,
    language_of,
)
from dataset.encode import FrozenTokenizer
from dataset.jsonl import read_rows, to_messages
from model.chat import render
from scripts import audit_sft

WORDS = "天 空 是 蓝 的 the sky is blue because light scatters 你 好 吗 code water tree".split()


def audit(capsys, path, *flags):
    return run_main(audit_sft, capsys, "--data_path", path, *flags)


def figures_of(capsys, folder, path, *flags):
    target = folder / "audit.json"
    status, out, err = audit(capsys, path, "--json", target, "--force", *flags)
    assert status == 0, err
    return json.loads(target.read_text(encoding="utf-8")), out


@pytest.fixture(scope="module")
def rows():
    rng, made = random.Random(3), []
    for i in range(120):
        turns = [{"role": "system", "content": "Be kind."}] if i % 7 == 0 else []
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            turns.append({"role": "user", "content": " ".join(rng.choices(WORDS, k=rng.randrange(2, 40)))})
            turns.append({"role": "assistant", "content": " ".join(rng.choices(WORDS, k=rng.randrange(1, 120)))})
        if i % 9 == 0:
            turns[-1]["content"] += "\n```Python\nprint(1)\n```"
        made.append({"conversations": turns})
    made += [made[4], {"messages": made[5]["conversations"]}, made[4]]  # the second in another format
    return made


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_len", [40, 340])
def test_figures_are_those_of_a_naive_count(tmp_path, capsys, tokenizer, rows, max_len):
    found, out = figures_of(capsys, tmp_path, write_rows(tmp_path / "a.jsonl", rows), "--max_len", max_len)
    n, lengths, labels, cut, lost = len(rows), [], [], 0, 0
    for row in rows:
        ids, mask = render(tokenizer, to_messages(row))
        lengths.append(len(ids))
        labels.append(sum(mask[1:max_len]))
        replies = "".join(map(str, mask)).replace("0", " ").split()
        left = "".join(map(str, mask[:max_len])).replace("0", " ").split()
        lost += len(replies) - len(left)
        cut += bool(left) and len(left[-1]) < len(replies[len(left) - 1])
    pads = [max(max_len - length, 0) for length in lengths]
    assert found["lengths"]["mean"] == pytest.approx(sum(lengths) / n)
    assert [found["lengths"][k] for k in ("min", "max", "median")] == [min(lengths), max(lengths), np.median(lengths)]
    assert found["truncated"] == {
        str(size): sum(length > size for length in lengths) for size in {256, 340, 512, 768, 1024, 2048, max_len}
    }
    assert found["labeled"] == {
        **{"mean": pytest.approx(sum(labels) / n), "median": np.median(labels), "min": min(labels)},
        **{"max": max(labels), "zero": labels.count(0)},
    }
    assert found["pads"]["mean"] == pytest.approx(sum(pads) / n)
    assert (found["pads"]["none"], found["pads"]["near_full"]) == (pads.count(0), sum(pad <= 5 for pad in pads))
    assert found["replies"][str(max_len)] == {"replies_cut": cut, "replies_lost": lost, "dropped": labels.count(0)}
    said = ["\n".join(turn["content"] for turn in to_messages(row)) for row in rows]
    assert found["code"] == sum("```" in text for text in said) == found["python"] > 10
    turns = [sum(turn["role"] == "assistant" for turn in to_messages(row)) for row in rows]
    assert found["turns"]["max"] == max(turns) and found["turns"]["several"] == sum(turn > 1 for turn in turns)
    assert found["turns"]["system"] == sum(to_messages(row)[0]["role"] == "system" for row in rows)
    assert found["duplicates"]["count"] == 3 and found["faults"] == {}
    assert found["duplicates"]["pairs"] == [[121, 5], [122, 6], [123, 5]]
    assert sum(found["languages"].values()) == n
    trained = [min(length, max_len) for length, label in zip(lengths, labels, strict=True) if label]
    assert_padding(found["padding"], trained, max_len)
    assert f"[Audit] pad_count mean={sum(pads) / n:.1f} median={np.median(pads):.1f} min={min(pads)} " in out


def test_a_row_that_just_fits_is_not_truncated(tmp_path, capsys, tokenizer):
    row = chat("q", "some words to fill it")
    length = len(render(tokenizer, to_messages(row)).input_ids)
    path = write_rows(tmp_path / "a.jsonl", [row])
    # the last token is the line break behind the reply, the one before it the end marker
    for max_len, cut, replies_cut in ((length, 0, 0), (length - 1, 1, 0), (length - 2, 1, 1)):
        found, _ = figures_of(capsys, tmp_path, path, "--max_len", max_len)
        assert found["truncated"][str(max_len)] == cut
        assert found["replies"][str(max_len)]["replies_cut"] == replies_cut


def assert_padding(padding, lengths, max_len):
    rooms = []  # best fit, one document after the other
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else max_len) - length)
    assert (padding["rows"], padding["packed_rows"]) == (len(lengths), len(rooms))
    assert padding["unpacked"] == pytest.approx(sum(max_len - length for length in lengths) / max_len / len(lengths))
    assert padding["packed"] == pytest.approx(sum(rooms) / max_len / len(rooms))


@pytest.mark.parametrize("n", [1, 7, 99, 100, 101, 5000])
def test_recommended_length_is_the_smallest_that_cuts_one_percent(n):
    lengths = np.random.default_rng(n).integers(5, 3000, n)
    advised, exact = audit_sft.recommended_length(lengths)
    assert advised == next(size for size in range(64, 4000, 64) if (lengths > size).sum() <= 0.01 * n)
    assert exact == next(size for size in range(4000) if (lengths > size).sum() <= 0.01 * n)


def test_lines_come_in_the_order_of_the_design_document(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", [chat("q", "a" * i) for i in range(1, 11)])
    lines = audit(capsys, path)[1].splitlines()
    starts = ["data=", "code-like samples: 0 (0.00%)", "mention 'python': 0 (0.00%)", "pad_count mean="]
    starts += [
        "sequences fully packed (pad=0): 0 (0.00%)",
        "sequences near full (pad<=5): 0 (0.00%)",
        "labeled_tokens ",
    ]
    assert [line[: len(start) + 8] for line, start in zip(lines, starts, strict=False)] == [
        f"[Audit] {start}" for start in starts
    ]
    assert lines[0] == f"[Audit] data={path} max_len=340 scanned=10/10" and "[Suggestion]" in lines


@pytest.mark.parametrize(
    "text, code",
    [
        ("```\nx\n```", True),
        ("def f(x):\n    return x", True),
        ("class Foo:\n    pass", True),
        ("class Foo(Bar):", True),
        ("  import numpy as np\n", True),
        ("from a.b import c", True),
        ("#include <stdio.h>\nint main() {}", True),
        ("public static void main(String[] a)", True),
        ("they import goods and export cars", False),
        ("import taxes are high, and so are others", False),
        ("the class of 1999: a story", False),
        ("this definition (def) is from here", False),
        ("\n" * 20000 + "x", False),
    ],
)
def test_code_is_told_from_prose(text, code):
    assert is_code(text) is code


@pytest.mark.parametrize(
    "text, language",
    [("天空是蓝的。", "zh"), ("The sky", "en"), ("Это небо", "other"), ("そらはあおい", "other"), ("1 + 1", "other")]
    + [("写一个 Python 函数", "zh"), ("Translate 天 into English please", "en"), ("Être là", "en")],
)
def test_language_goes_by_script(text, language):
    assert language_of(text) == language


# --- the draw ---------------------------------------------------------------------------------------------------------


def test_the_draw_is_fair_repeatable_and_in_order():
    counts = Counter()
    for seed in range(2000):
        total = [0]
        drawn = list(audit_sft.sampled(range(10), 3, seed, total))
        assert drawn == sorted(drawn) and len(set(drawn)) == 3 and total == [10]
        assert drawn == list(audit_sft.sampled(range(10), 3, seed, [0]))
        counts.update(drawn)
    assert all(500 < counts[i] < 700 for i in range(10))  # 600 expected, five standard deviations
    assert list(audit_sft.sampled(range(10), 0, 1, [0])) == list(audit_sft.sampled(range(10), 99, 1, [0]))


def test_a_seed_draws_rows_from_all_of_the_file(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", [chat("q", "a " * i) for i in range(200)][1:])
    flags = ("--scan_samples", 20, "--seed")
    first, out = figures_of(capsys, tmp_path, path, *flags, 1)
    assert (first["scanned"], first["rows"]) == (20, 199) and "scanned=20/199" in out and "--scan_samples 0" in out
    assert first == figures_of(capsys, tmp_path, path, *flags, 1)[0]
    assert first["lengths"] != figures_of(capsys, tmp_path, path, *flags, 2)[0]["lengths"]
    assert first["lengths"]["max"] > 100


# --- duplicates -------------------------------------------------------------------------------------------------------


def shingles(text):
    return {text[i : i + 5] for i in range(len(text) - 4)}


def test_estimated_similarity_is_near_the_true_one():
    rng, signer = random.Random(5), Signer()
    base = "".join(rng.choices("abcdefghij", k=600))
    for changes in (0, 2, 5, 10, 40, 600):
        other = list(base)
        for place in rng.sample(range(600), changes):
            other[place] = rng.choice("klmnopqrst")
        other = "".join(other)
        one, two = shingles(base), shingles(other)
        truth = len(one & two) / len(one | two)
        assert estimated_similarity(signer([base])[1], signer([other])[1]) == pytest.approx(truth, abs=0.14)


def test_near_duplicates_are_found_and_others_are_not():
    rng, signer, texts, origins = random.Random(6), Signer(), [], []
    for i in range(300):
        if i % 10 == 9:  # an earlier one with one change
            origin = rng.randrange(len(texts))
            text = texts[origin][:100] + "!" + texts[origin][101:]
        else:
            origin, text = i, "".join(rng.choices("abcdefghijklmnop", k=300))
        texts.append(text)
        origins.append(origin)
    columns = [np.array(column) for column in zip(*(signer([text]) for text in texts), strict=True)]
    found = first_similar(*columns, threshold=0.8)
    for i, text in enumerate(texts):
        one, two = shingles(text), shingles(texts[found[i]])
        assert found[i] == i or len(one & two) / len(one | two) > 0.7
        assert (found[i] == i) == (origins[i] == i)


def test_near_duplicates_do_not_count_exact_ones_again(tmp_path, capsys):
    long = "The quick brown fox jumps over the lazy dog and runs away from it " * 5
    rows = [chat("q", long), chat("q", long), chat("q", long + "!"), chat("other", "nothing like that at all")]
    found, out = figures_of(capsys, tmp_path, write_rows(tmp_path / "a.jsonl", rows), "--near_dup", 1)
    assert found["duplicates"]["pairs"] == [[2, 1]] and found["near_duplicates"]["pairs"] == [[3, 1]]
    assert "near duplicates (similarity >= 0.8): 1 (25.00%), such as line 3 of 1" in out
    assert "--near_dup 1 清洗" in out and "重复样本 2 条" in out


@pytest.mark.slow
def test_processes_find_the_same(tmp_path, tokenizer, rows):
    path = write_rows(tmp_path / "a.jsonl", rows * 40)  # several batches
    inspection = Inspection("sft", FrozenTokenizer(tokenizer), (40, 340), near=True)
    one, two = (list(inspect_rows(read_rows(path).raw, inspection, workers)) for workers in (0, 2))
    assert len(one) > 2 and [part.reports for part in one] == [part.reports for part in two]
    one, two = joined_columns(one), joined_columns(two)
    assert one["position"].tolist() == list(range(len(rows) * 40)) and one["line"][-1] == len(rows) * 40
    for name, column in one.items():
        assert np.array_equal(column, two[name]), name


# --- faults and advice ------------------------------------------------------------------------------------------------


def test_faults_are_named_with_their_lines(tmp_path, capsys):
    rows = [chat() for _ in range(9)]
    rows[1] = {"conversations": [{"role": "robot", "content": "x"}]}
    rows[3] = rows[6] = {"conversations": [{"role": "user", "content": None}]}
    rows[4] = {"conversations": [{"role": "user", "content": "only a question"}]}
    rows[5] = {"conversations": [{"role": "user", "content": " "}]}
    path = write_rows(tmp_path / "a.jsonl", rows)
    path.write_bytes(path.read_bytes() + b'{"conversations": [\n')
    found, out = figures_of(capsys, tmp_path, path)
    assert {name: kind["lines"] for name, kind in found["faults"].items()} == {
        **{"null content": [4, 7], "unknown role": [2], "no assistant turn": [5]},
        **{"empty content": [6], "broken JSON": [10]},
    }
    assert (found["scanned"], found["good"]) == (10, 4)
    assert "[Audit] faulty rows: 6\n[Audit]   null content: 2, at line 4, 7\n" in out and "有问题的样本 6 条" in out


def test_advice_follows_from_the_figures(tmp_path, capsys):
    code = [chat("code", "```python\nx\n```")]
    long = [chat("q", f"{i} " + "long words " * 40) for i in range(10)]
    short = [chat("q", f"answer {i}") for i in range(200)]
    _, out = figures_of(capsys, tmp_path, write_rows(tmp_path / "a.jsonl", short + code), "--max_len", 97)
    assert "max_seq_len=97 可以接受。" in out and "<1%（0.50%）" in out and "清洗" not in out
    found, out = figures_of(capsys, tmp_path, write_rows(tmp_path / "a.jsonl", short[:90] + long), "--max_len", 50)
    assert f"10.0% 的样本超过 max_len=50），建议把 SFT max_seq_len 提到 {found['recommended']['max_len']}。" in out
    assert "padding" in out and found["recommended"]["max_len"] >= 64
    _, out = figures_of(capsys, tmp_path, write_rows(tmp_path / "a.jsonl", short[:40] + code))
    assert "偏低（2.44% <5%）" in out
    _, out = figures_of(capsys, tmp_path, write_rows(tmp_path / "a.jsonl", short[:9] + code))
    assert "不算太低（10.0%）" in out and "而不是截断" in out


# --- files ------------------------------------------------------------------------------------------------------------


def test_histogram_and_figures_are_written_but_never_over_another_file(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", [chat("q", "a " * i) for i in range(1, 50)])
    picture, target = tmp_path / "new" / "a.png", tmp_path / "a.json"
    assert audit(capsys, path, "--hist", picture, "--json", target)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and json.loads(target.read_text("utf-8"))["rows"] == 49
    for flags in (("--hist", picture), ("--json", target), ("--json", path, "--force")):
        before = path.read_bytes(), picture.read_bytes(), target.read_bytes()
        status, out, err = audit(capsys, path, *flags)
        assert status == 2 and out == "" and ("--force" in err or "is the input" in err)
        assert before == (path.read_bytes(), picture.read_bytes(), target.read_bytes())


@every_broken_file
def test_broken_files_are_named_in_one_line(tmp_path, capsys, name):
    path, message = broken_file(tmp_path, name)
    status, out, err = audit(capsys, path)
    assert status == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ")
    assert message in err and name.split(".")[0] in err


@pytest.mark.slow
@pytest.mark.parametrize("folder", [".", "trainer", "scripts"])
def test_the_design_documents_command_runs_everywhere(folder):
    up = "" if folder == "." else "../"
    flags = ("--weight", "full_sft", "--data_path", f"{up}dataset/sample/sft.jsonl", "--max_len", 340)
    finished = run_script(f"{up}scripts/audit_sft.py", *flags, "--scan_samples", 20000, cwd=ROOT / folder)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("[Audit] data=") and finished.stderr == ""
