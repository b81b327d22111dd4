"""The shipped tokenizer (its ids, classes and lossless text) and the script that trains one."""

import importlib.util
import json
import random
import subprocess
import sys

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from conftest import ROOT, run_script

SPEC = importlib.util.spec_from_file_location("train_tokenizer", ROOT / "scripts" / "train_tokenizer.py")
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>"]
TAGS += ["<tool_response>", "</tool_response>"]
TRAIN = "scripts/train_tokenizer.py"


# ---------------------------------------------------------------------------------------------------------------------
# the shipped one


def test_entries_and_control_ids(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == 6400
    assert sorted(tokenizer.get_vocab().values()) == list(range(6400))
    assert tokenizer.convert_tokens_to_ids(SPECIAL + TAGS) == list(range(11))
    added = tokenizer.added_tokens_decoder
    reserved = {i: token for i, token in added.items() if i > 10}
    assert sorted(added) == list(range(len(added)))
    assert len(reserved) >= 4
    assert all(token.content.startswith("<|reserved_") and token.special for token in reserved.values())
    assert [added[i].special for i in range(11)] == [True] * 3 + [False] * 8


def test_configuration(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 0)
    assert tokenizer.model_max_length == 32768
    assert tokenizer.padding_side == tokenizer.truncation_side == "right"
    assert set(tokenizer("你好 world")) == {"input_ids", "attention_mask"}  # token_type_ids would break generate()
    config = json.loads((ROOT / "model" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # what 4.x and 5.x read alike
    assert "chat_template" not in config  # it has a file of its own
    assert tokenizer.chat_template == (ROOT / "model" / "chat_template.jinja").read_text(encoding="utf-8")


def test_loads_by_name_from_the_repository_root():
    code = "from transformers import AutoTokenizer as A; print(A.from_pretrained('model')('<|im_end|>').input_ids)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[2]"


def test_control_strings_are_single_tokens_and_tags_stay_visible(tokenizer):
    for text in SPECIAL + TAGS:
        assert tokenizer(text)["input_ids"] == [tokenizer.convert_tokens_to_ids(text)]
    ids = tokenizer("".join(SPECIAL + TAGS))["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(TAGS)


def test_saving_and_loading_keeps_the_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    text = "你好, world! <think>\n  x = 10\n</think><|im_end|>"
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_the_pre_tokenizer_is_gpt2s_own(tokenizer):
    """GGUF files name it "gpt-2"; any other would give other ids in llama.cpp."""
    data = json.loads((ROOT / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] == data["pre_tokenizer"]
    stock = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    assert data["pre_tokenizer"] == stock
    assert data["normalizer"] is None and data["post_processor"] is None
    assert data["model"]["type"] == "BPE" and not data["model"]["byte_fallback"] and not data["model"]["ignore_merges"]


def test_every_unicode_character_survives(tokenizer):
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
    texts = ["".join(characters[start : start + 997]) for start in range(0, len(characters), 997)]
    assert tokenizer.batch_decode(tokenizer(texts)["input_ids"]) == texts


def test_random_unicode_text_survives(tokenizer):
    """Mixtures of all planes, joined emoji, combining marks, right-to-left text, control characters, spaces."""
    rng = random.Random(7)
    emoji = ["\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f1e8\U0001f1f3", "\U0001f44d\U0001f3fd", "\ufe0f"]
    scripts = ["e\u0301\u0323", "שלום", "مرحبا", "नमस्ते", "你好", "don't", " 's", " . ,", "# "]
    invisible = [
        "\u202eabc\u202c",
        "\ufeff",
        "\u2028",
        "\x00",
        "\x1b[0m",
        "\r\n",
        "\n\n",
        "\t",
        "    ",
        "\u3000",
        "\xa0",
    ]
    pool = emoji + scripts + invisible
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    for _ in range(3000):
        parts = (rng.choice(pool) if rng.random() < 0.5 else chr(rng.randint(*rng.choice(ranges))) for _ in range(30))
        text = "".join(parts)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_compression_of_text_that_no_tokenizer_training_saw(tokenizer):
    """A floor under the figures of docs/tokenizer.md, on the part of them that is in the repository."""
    texts = {"zh": [], "en": [], "code": []}
    for text in script.read_documents(ROOT / "dataset" / "sample" / "pretrain_val.jsonl"):
        texts[script.language(text)].append(text)
    ratio = {name: script.measure(tokenizer.backend_tokenizer, group)["ratio"] for name, group in texts.items()}
    assert ratio["zh"] > 1.1 and ratio["en"] > 2.85, ratio
    code = (ROOT / "model" / "sandbox.py").read_text(encoding="utf-8")
    assert script.measure(tokenizer.backend_tokenizer, [code])["ratio"] > 2.3


# ---------------------------------------------------------------------------------------------------------------------
# the script


@pytest.fixture
def corpus(tmp_path):
    rng = random.Random(3)
    words = ["alpha", "beta", "gamma", "delta", "人工智能", "机器学习", "春眠不觉晓", "return", "print(x)", "2026"]
    texts = [" ".join(rng.choice(words) for _ in range(20)) + f" {index}" for index in range(400)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8", newline="\n")
    return path


def test_training_is_deterministic_whatever_the_threads(corpus, tmp_path):
    settings = [
        {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"},
        {"RAYON_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true"},
        {"TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "5"},
    ]
    written = []
    for number, env in enumerate(settings):
        out_dir = tmp_path / f"tokenizer_{number}"
        result = run_script(TRAIN, "--data", f"{corpus}:1.5", "--vocab_size", 340, "--out_dir", out_dir, env=env)
        assert result.returncode == 0, result.stderr
        assert sorted(path.name for path in out_dir.iterdir()) == sorted(script.FILES)
        written.append([(out_dir / name).read_bytes() for name in script.FILES])
    assert written[0] == written[1] == written[2]
    assert "round trip: 2000" in result.stdout and " zh " in result.stdout
    trained = AutoTokenizer.from_pretrained(tmp_path / "tokenizer_0")
    assert len(trained) == 340
    assert trained.convert_tokens_to_ids(SPECIAL + TAGS) == list(range(11))
    assert trained.chat_template.startswith("{#- ChatML")
    assert (
        trained.decode(trained("<think><|im_end|><|reserved_0|>")["input_ids"], skip_special_tokens=True) == "<think>"
    )


def test_a_newcomer_trains_on_the_sample_data_alone(tmp_path):
    result = run_script(TRAIN, "--sample_only", "--vocab_size", 6400, "--out_dir", tmp_path / "mine")
    assert result.returncode == 0, result.stderr
    assert "_val.jsonl" not in result.stdout
    assert len(AutoTokenizer.from_pretrained(tmp_path / "mine")) == 6400


def test_an_existing_tokenizer_is_not_replaced_without_force(corpus, tmp_path):
    command = [TRAIN, "--data", corpus, "--vocab_size", 320, "--out_dir", tmp_path / "out"]
    assert run_script(*command).returncode == 0
    before = (tmp_path / "out" / "tokenizer.json").read_bytes()
    command[4] = 330
    refused = run_script(*command)
    assert refused.returncode == 2
    assert "holds a tokenizer already" in refused.stderr and "--force" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == before
    assert run_script(*command, "--force").returncode == 0
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab_size() == 330


def test_the_shipped_tokenizer_is_not_replaced_without_force():
    with pytest.raises(FileExistsError, match="holds a tokenizer already"):
        script.refuse_to_replace(ROOT / "model", force=False)


def test_a_failed_write_leaves_the_old_tokenizer(corpus, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("old", encoding="utf-8")

    def disk_full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(script.os, "replace", disk_full)
    arguments = ["--data", str(corpus), "--vocab_size", "320", "--out_dir", str(tmp_path), "--force"]
    with pytest.raises(OSError, match="no space"):
        script.main(arguments)
    assert (tmp_path / "tokenizer.json").read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--out_dir", "x"], "either --data FILE ... or --sample_only"),
        (["--data", "CORPUS", "--sample_only", "--out_dir", "x"], "either --data FILE ... or --sample_only"),
        (["--data", "CORPUS"], "--out_dir"),
        (["--data", "nowhere.jsonl", "--out_dir", "x"], "no file at"),
        (["--data", "CORPUS:0", "--out_dir", "x"], "weight of"),
        (["--data", "CORPUS", "--out_dir", "x", "--vocab_size", "200"], "too small"),
        (["--data", "CORPUS", "--out_dir", "x", "--vocab_size", "60000"], "train on more text"),
        (["--data", "CORPUS", "--out_dir", "x", "--holdout", "1.5"], "--holdout"),
        (["--data", "BAD", "--out_dir", "x"], "bad.jsonl:2: "),
    ],
)
def test_mistakes_are_one_clear_line(corpus, tmp_path, arguments, reason):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"txt": "what"}\n', encoding="utf-8")
    places = {"CORPUS": corpus, "BAD": bad}
    named = [str(places.get(part.partition(":")[0], part)) + "".join(part.partition(":")[1:]) for part in arguments]
    result = run_script(ROOT / TRAIN, *named, cwd=tmp_path)
    assert result.returncode == 2
    assert reason in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "x").exists()


def test_held_back_documents_are_chosen_by_content_and_not_trained_on(tmp_path):
    texts = [f"document {index} " + "word " * 5 for index in range(4000)]
    held = [text for text in texts if script.is_held_back(text, 0.05)]
    assert 150 < len(held) < 250  # 4000 * 0.05 = 200, standard deviation 14
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(reversed(texts)), encoding="utf-8")
    trained_on = set(script.training_texts([script.Source(path, 1.0)], 0.05)) - {script.HEADERS}
    assert trained_on == {text for text in texts if text not in held}


@pytest.mark.parametrize("weight", [0.25, 1.0, 2.0, 2.5])
def test_weights_repeat_and_thin_out_documents(tmp_path, weight):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(f"line {index}" for index in range(2000)), encoding="utf-8")
    count = sum(text != script.HEADERS for text in script.training_texts([script.Source(path, weight)], 0.0))
    assert abs(count - 2000 * weight) <= (0 if weight == int(weight) else 100)


def test_rows_of_every_format_are_read_as_documents(tmp_path):
    rows = [
        {"text": "plain"},
        {"input": "in", "output": "out"},
        {
            "conversations": [
                {"role": "system", "content": "", "tools": '[{"name": "f"}]'},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [{"name": "f"}]},
            ]
        },
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert list(script.read_documents(path)) == ["plain", "in\nout", '[{"name": "f"}]\nq\nr\n[{"name": "f"}]']


def test_languages_and_the_measure_by_hand():
    tokenizer = Tokenizer.from_file(str(ROOT / "model" / "tokenizer.json"))
    assert script.language("用 numpy 的 dot 函数计算矩阵乘积") == "zh"
    assert script.language("He said 你好 to all of them in the room") == "en"
    assert script.language("看：\n```python\nprint('hello world')\n```") == "code"
    measured = script.measure(tokenizer, ["the", "!?!", "的"])
    tokens = 1 + len(tokenizer.encode("!?!").ids) + 1
    assert measured == {"documents": 3, "characters": 7, "tokens": tokens, "ratio": 7 / tokens}


def test_weights_are_read_from_the_end_of_the_path(corpus):
    assert script.parse_source(f"{corpus}:2.5") == script.Source(corpus, 2.5)
    assert script.parse_source(str(corpus)) == script.Source(corpus, 1.0)
    odd = corpus.rename(corpus.with_name("a:b.jsonl")) if sys.platform != "win32" else corpus
    assert script.parse_source(str(odd)) == script.Source(odd, 1.0)
