"""The commands and snippets that the design documents and README.md show work as they are written there.

Each is typed into a shell, in a fresh copy of the repository, with a few rows in the files that it names; `python` and
`torchrun` are those of the interpreter that runs the tests. Models have their real size, so only the data is small.

    python -m pytest tests/test_documents.py
"""

import importlib
import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

BASH = shutil.which("bash")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BASH is None, reason="the documents' commands are for bash")]


# --- a copy of the repository, and a shell in it ----------------------------------------------------------------------


def project_files():
    """Names of all files that belong to the project, relative to the root: none of the user's data or weights."""
    if shutil.which("git") and (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True
        )
        return [name for name in listed.stdout.decode("utf-8").split("\0") if name and (ROOT / name).is_file()]
    patterns = ("*.py", "model/*", "dataset/*.py", "dataset/sample/*", "trainer/*.py", "scripts/**/*.*")
    return [path.relative_to(ROOT).as_posix() for one in patterns for path in ROOT.glob(one) if path.is_file()]


class Checkout:
    """A fresh copy of the repository."""

    def __init__(self, folder: Path):
        self.root, self.bin = folder / "minimind", folder / "bin"
        for name in project_files():
            target = self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        self.bin.mkdir()
        # no links: Python would look for its packages beside the link
        for name, flags in (("python", ""), ("torchrun", "-m torch.distributed.run")):
            (self.bin / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {flags} "$@"\n')
            (self.bin / name).chmod(0o755)

    def type(self, commands, status=0, stdin="", **variables):
        """Run shell commands in the root, check their exit status, return what they printed."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        env |= {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [BASH, "-e", "-c", commands],
            cwd=self.root,
            env=env | {"HOME": str(self.bin.parent)} | variables,  # no key of the user's is found there
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=300,
        )
        assert done.returncode == status, f"{commands}\nended with status {done.returncode}:\n{done.stdout}"
        return done.stdout

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")

    def write_rows(self, name, rows):
        self.write(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def metrics(self, name):
        (folder,) = (self.root / "out/runs").glob(f"{name}-*")
        return self.read_json(folder / "metrics.jsonl")

    def read_json(self, name):
        return [json.loads(line) for line in (self.root / name).read_text(encoding="utf-8").splitlines()]


def texts(count):
    return [{"text": f"第{n}天，天气很好。On day {n} the weather was fine."} for n in range(count)]


def chats(count):
    pairs = ((f"{n}加一是多少？", f"{n}加一等于{n + 1}。") for n in range(count))
    return [{"conversations": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]


@pytest.fixture(scope="module")
def new_checkout(tmp_path_factory):
    made = []

    def make():
        folder = tmp_path_factory.mktemp("checkout")
        made.append(folder)
        checkout = Checkout(folder)
        checkout.write_rows("dataset/pretrain_hq.jsonl", texts(12))
        checkout.write_rows("dataset/sft_mini_512.jsonl", chats(12))
        checkout.write_rows("your_pretrain.jsonl", texts(40))
        return checkout

    yield make
    for folder in made:  # each holds weights of some hundred MB
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def checkout(new_checkout):
    return new_checkout()


LOG_LINE = re.compile(r"Epoch:\[1/\d+\]\(\d+/\d+\) loss:[\d.]+ ppl:[\d.]+ lr:\S+ tokens/s:[\d,]+ ETA:[\d.]+min")


def sidecar(checkout, name):
    return json.loads((checkout.root / "out" / f"{name}.json").read_text(encoding="utf-8"))


def arguments(checkout, name):
    return sidecar(checkout, name)["arguments"]


# --- document 000: from trainer/, each step after the one before ------------------------------------------------------


@pytest.fixture(scope="module")
def story(new_checkout):
    return new_checkout()


@pytest.fixture(scope="module")
def pretrained(story):
    return story.type(
        "cd trainer\n"
        "python train_pretrain.py --data_path ../dataset/pretrain_hq.jsonl --save_weight pretrain --epochs 1 "
        "--batch_size 32 --learning_rate 5e-4 --max_seq_len 340"
    )


@pytest.fixture(scope="module")
def tuned(story, pretrained):
    return story.type(
        "cd trainer\n"
        "python train_full_sft.py --data_path ../dataset/sft_mini_512.jsonl --from_weight pretrain "
        "--save_weight full_sft --epochs 1 --learning_rate 1e-6 --max_seq_len 340"
    )


def test_files_of_the_tree_are_there():
    for name in (
        *("model", "trainer", "dataset/sample", "scripts", "README.md", ".gitignore", "LICENSE", "environment.yml"),
        *("requirements.txt", "requirements-torch-cu126.txt", "requirements-torch-cpu.txt"),
    ):
        assert (ROOT / name).exists(), name


def test_dependency_check(story):
    printed = story.type(
        """python -c "import torch, transformers; print('ok', torch.__version__, transformers.__version__)\""""
    )
    assert re.search(r"^ok \S+ \d+\.\d+\S*$", printed, re.MULTILINE)


def test_pretrain_from_trainer(story, pretrained):
    assert LOG_LINE.search(pretrained)
    assert (story.root / "out/pretrain_512.pth").exists()
    assert (story.root / "checkpoints/pretrain_512_resume.pth").exists()
    used = arguments(story, "pretrain_512")
    assert (used["epochs"], used["batch_size"], used["learning_rate"], used["max_seq_len"]) == (1, 32, 5e-4, 340)
    assert sidecar(story, "pretrain_512")["data"]["rows"] == 12


def test_full_sft_from_trainer(story, tuned):
    assert LOG_LINE.search(tuned)
    assert (story.root / "out/full_sft_512.pth").exists()
    assert sidecar(story, "full_sft_512")["data"]["rows"] == 12
    assert arguments(story, "full_sft_512")["learning_rate"] == 1e-6


SNIPPET_CHECKPOINT = """
from model.model_minimind import MiniMindConfig
from trainer.trainer_utils import get_lr, get_lr_with_warmup, lm_checkpoint

for step in (0, 50, 100):
    print("get_lr", step, get_lr(step, 100, 5e-4))
for step in (0, 9, 10, 55, 100):
    print("warmup", step, get_lr_with_warmup(step, 100, 5e-4, 10))

state = lm_checkpoint(MiniMindConfig(hidden_size=512, num_hidden_layers=8), weight="pretrain")
print("epoch:", state["epoch"], "step:", state["step"])
"""


def test_learning_rates_and_checkpoint_by_hand(story, pretrained):
    story.write("play_utils.py", SNIPPET_CHECKPOINT)
    printed = story.type("python play_utils.py")
    found = {(kind, int(step)): float(lr) for kind, step, lr in re.findall(r"(get_lr|warmup) (\d+) (\S+)", printed)}
    assert found == pytest.approx(
        {
            ("get_lr", 0): 5e-4,
            ("get_lr", 50): 5e-4 * 0.55,
            ("get_lr", 100): 5e-5,
            ("warmup", 0): 5e-5,  # a tenth of the way up; the update before the first would be 0
            ("warmup", 9): 5e-4,
            ("warmup", 10): 5e-4,
            ("warmup", 55): 5e-4 * 0.55,
            ("warmup", 100): 5e-5,
        }
    )
    assert "epoch: 0 step: 1" in printed  # 12 rows are one batch of 32


@pytest.fixture(scope="module")
def mixed(story):
    """What the two data commands print, with as many general rows as they ask for."""
    story.write_rows("dataset/sft_mini_512.jsonl", chats(50_000))
    generated = story.type(
        "cd trainer\npython ../scripts/generate_code_sft.py --out ../dataset/sft_code_5k.jsonl --n 5000 --seed 42"
    )
    mix = story.type(
        "cd trainer\n"
        "python ../scripts/build_sft_mix.py --base_path ../dataset/sft_mini_512.jsonl --base_n 50000 "
        "--code_path ../dataset/sft_code_5k.jsonl --code_repeat 5 --out_path ../dataset/sft_mix_75k.jsonl --seed 42"
    )
    yield generated, mix
    story.write_rows("dataset/sft_mini_512.jsonl", chats(12))


def test_code_rows_and_mix(story, mixed):
    assert len(story.read_json("dataset/sft_code_5k.jsonl")) == 5000
    assert re.search(r"^Base: sampled 50000 from 50000$", mixed[1], re.MULTILINE)
    assert re.search(r"^Code: 5000 \* 5 = 25000$", mixed[1], re.MULTILINE)
    assert re.search(r"^Total mixed: 75000\b", mixed[1], re.MULTILINE)
    assert len(story.read_json("dataset/sft_mix_75k.jsonl")) == 75_000


def test_mix_of_a_base_that_is_smaller(checkout):
    """With fewer rows than are asked for, all of them are taken, and the sum says so."""
    printed = checkout.type(
        "cd trainer\n"
        "python ../scripts/generate_code_sft.py --out ../dataset/sft_code_5k.jsonl --n 30 --seed 42\n"
        "python ../scripts/build_sft_mix.py --base_path ../dataset/sft_mini_512.jsonl --base_n 50000 "
        "--code_path ../dataset/sft_code_5k.jsonl --code_repeat 5 --out_path ../dataset/sft_mix_75k.jsonl --seed 42"
    )
    assert re.search(rf"^Total mixed: {12 + 30 * 5}\b", printed, re.MULTILINE)


def test_go_on_with_the_mix(story, tuned, mixed):
    lines = (story.root / "dataset/sft_mix_75k.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    story.write("dataset/sft_mix_75k.jsonl", "".join(lines[:16]))  # all 75,000 would take a day
    printed = story.type(
        "cd trainer\n"
        "python train_full_sft.py --from_weight full_sft --save_weight full_sft_seq512_code --epochs 1 "
        "--learning_rate 5e-6 --batch_size 8 --accumulation_steps 2 --max_seq_len 512 "
        "--data_path ../dataset/sft_mix_75k.jsonl"
    )
    assert "(1/1)" in LOG_LINE.search(printed)[0]  # two batches of 8 are one update
    assert (story.root / "out/full_sft_seq512_code_512.pth").exists()
    used = arguments(story, "full_sft_seq512_code_512")
    assert (used["from_weight"], used["accumulation_steps"], used["max_seq_len"]) == ("full_sft", 2, 512)


# --- document 001: from the root --------------------------------------------------------------------------------------

SNIPPET_FOLDER = """
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.presets import PRESETS
from transformers import AutoTokenizer

MiniMindForCausalLM(MiniMindConfig(**PRESETS["tiny"])).save_pretrained("MiniMind2")
AutoTokenizer.from_pretrained("model").save_pretrained("MiniMind2")
"""


def test_day_1_a_folder_in_transformers_format(story):
    story.write("make_folder.py", SNIPPET_FOLDER)
    printed = story.type("python make_folder.py\npython eval_llm.py --load_from ./MiniMind2", stdin="你好\n\n")
    assert "MiniMind2" in printed and re.search(r"\[Speed\]: [\d.]+ tokens/s", printed)


SNIPPET_SIZE = """
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

cfg = MiniMindConfig(hidden_size=512, num_hidden_layers=8)
m = MiniMindForCausalLM(cfg)
print(sum(p.numel() for p in m.parameters()) / 1e6, "M params")
"""


def test_day_2_parameter_count(story):
    story.write("play_model_size.py", SNIPPET_SIZE)
    assert "25.829888 M params" in story.type("python play_model_size.py")


SNIPPET_DATASET = """
from transformers import AutoTokenizer
from dataset.lm_dataset import PretrainDataset

tok = AutoTokenizer.from_pretrained("model")
ds = PretrainDataset("your_pretrain.jsonl", tok, max_length=32)

x, y, mask = ds[0]
print("x:", x.shape, "y:", y.shape, "mask:", mask.shape)
print("decoded x:", tok.decode(x, skip_special_tokens=False))
print("mask:", mask[:20])
"""


def test_day_4_dataset(story):
    story.write("play_pretrain_dataset.py", SNIPPET_DATASET)
    printed = story.type("python play_pretrain_dataset.py")
    assert "x: torch.Size([31]) y: torch.Size([31]) mask: torch.Size([31])" in printed
    assert "decoded x: <|im_start|>第0天，天气很好。On day 0 the weather was fine.<|im_end|>" in printed
    assert re.search(r"^mask: tensor\(\[(1, )+", printed, re.MULTILINE)


def test_day_6_toy_training(checkout):
    printed = checkout.type(
        "python trainer/train_pretrain.py --epochs 1 --batch_size 2 --max_seq_len 64 --data_path your_pretrain.jsonl"
    )
    assert "packed into 14 rows" in printed and len(LOG_LINE.findall(printed)) == 1  # two rows each make 7 updates
    logged = [entry for entry in checkout.metrics("pretrain_512") if "lr" in entry]
    # no update of warm-up (5 % of 7), then a cosine to a tenth
    peak = arguments(checkout, "pretrain_512")["learning_rate"]
    expected = peak * (0.1 + 0.45 * (1 + math.cos(math.pi * 6 / 7)))
    assert [entry["lr"] for entry in logged] == pytest.approx([expected])
    assert logged[0]["loss"] < math.log(6400) and logged[0]["ppl"] == pytest.approx(math.exp(logged[0]["loss"]))


SNIPPET_PLAIN_TEXT = """
import os
import math

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from dataset.lm_dataset import PlainTextDataset


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"

    tokenizer = AutoTokenizer.from_pretrained("model")

    dataset = PlainTextDataset(
        txt_path="data/toy_pretrain.txt",
        tokenizer=tokenizer,
        max_length=128,
        shuffle=True,
    )

    loader = DataLoader(
        dataset,
        batch_size=4,
        shuffle=True,
        num_workers=0,
        drop_last=True,
    )

    lm_config = MiniMindConfig(
        hidden_size=512,
        num_hidden_layers=4,
        max_seq_len=128,
        use_moe=False,
    )
    model = MiniMindForCausalLM(lm_config).to(device)

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    loss_fct = torch.nn.CrossEntropyLoss(reduction="none")

    model.train()

    for step, (X, Y, loss_mask) in enumerate(loader, start=1):
        X = X.to(device)
        Y = Y.to(device)
        loss_mask = loss_mask.to(device)

        outputs = model(X)
        logits = outputs.logits

        loss = loss_fct(
            logits.view(-1, logits.size(-1)),
            Y.view(-1),
        ).view(Y.size())

        loss = (loss * loss_mask).sum() / loss_mask.sum()

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        if step % 10 == 0:
            ppl = math.exp(loss.item()) if loss.item() < 20 else float("inf")
            print(f"step {step} | loss {loss.item():.4f} | ppl {ppl:.2f}")

        if step >= 50:
            break


if __name__ == "__main__":
    main()
"""
TOY_LINES = "今天我们读一段模型的代码。\n语言模型预测下一个词。\nThis is a small corpus.\n"


def test_section_3_mini_train_plaintext(story):
    story.write("data/toy_pretrain.txt", TOY_LINES * 14)  # 42 lines: 10 batches of 4
    story.write("mini_train_plaintext.py", SNIPPET_PLAIN_TEXT)
    printed = story.type("python mini_train_plaintext.py")
    losses = [float(loss) for loss in re.findall(r"^step \d+ \| loss ([\d.]+) \| ppl [\d.]+$", printed, re.MULTILINE)]
    assert len(losses) == 1 and losses[0] < 0.8 * math.log(6400)  # an untrained model is at log(6400)


# --- document 003: from the root --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guide(new_checkout):
    return new_checkout()


@pytest.fixture(scope="module")
def guide_pretrained(guide):
    return guide.type(
        r"""python trainer/train_pretrain.py \
    --epochs 1 \
    --batch_size 32 \
    --learning_rate 5e-4 \
    --hidden_size 512 \
    --num_hidden_layers 8 \
    --data_path ./dataset/pretrain_hq.jsonl"""
    )


@pytest.fixture(scope="module")
def guide_tuned(guide, guide_pretrained):
    return guide.type(
        r"""python trainer/train_full_sft.py \
    --epochs 2 \
    --batch_size 16 \
    --learning_rate 5e-7 \
    --from_weight pretrain \
    --data_path ./dataset/sft_mini_512.jsonl"""
    )


def test_pretrain_from_the_root(guide, guide_pretrained):
    assert LOG_LINE.search(guide_pretrained) and "25.83M parameters" in guide_pretrained
    assert (guide.root / "out/pretrain_512.pth").exists()
    assert (guide.root / "checkpoints/pretrain_512_resume.pth").exists()


def test_full_sft_from_the_root(guide, guide_tuned):
    assert LOG_LINE.search(guide_tuned) and "Epoch:[2/2](1/1)" in guide_tuned
    assert sidecar(guide, "full_sft_512")["stage"] == "Full SFT"


def test_eval_llm_under_scripts(guide, guide_tuned):
    printed = guide.type("python scripts/eval_llm.py --weight full_sft", stdin="你好\n\n")
    assert "full_sft_512.pth" in printed and re.search(r"\[Speed\]: [\d.]+ tokens/s \(\d+ tokens\)", printed)


def test_resume_is_noticed(guide, guide_pretrained):
    printed = guide.type("python trainer/train_pretrain.py --from_resume 1")
    assert "resumed pretrain_512_resume.pth: epoch 1, step 1/1" in printed
    assert LOG_LINE.search(printed) is None  # the run was at its end: no update is made twice


def test_float16_needs_cuda(checkout):
    command = "python trainer/train_pretrain.py --batch_size 8 --accumulation_steps 4 --dtype float16"
    printed = checkout.type(command, status=2)
    (line,) = re.findall(r"^error: .*", printed, re.MULTILINE)
    assert "--dtype float16" in line and "CUDA" in line and "bfloat16" in line
    assert "Traceback" not in printed and not (checkout.root / "out").exists()


def test_wandb_without_a_key_or_a_network(checkout):
    printed = checkout.type("python trainer/train_pretrain.py --use_wandb --wandb_project MyProject")
    assert LOG_LINE.search(printed) and (checkout.root / "out/pretrain_512.pth").exists()
    (run,) = (checkout.root / "out/runs").glob("pretrain_512-*/wandb/offline-run-*")
    assert list(run.glob("*.wandb"))


@pytest.mark.long
def test_four_processes(checkout):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    printed = checkout.type(
        r"""torchrun --nproc_per_node=4 trainer/train_pretrain.py \
    --batch_size 8 \
    --accumulation_steps 2""",
        PET_MASTER_PORT=port,  # torchrun's own default port may be in use
    )
    assert "4 process(es)" in printed and len(LOG_LINE.findall(printed)) == 1
    assert (checkout.root / "out/pretrain_512.pth").exists()


def test_old_spellings(checkout):
    checkout.type(
        "cd trainer\n"
        "python train_pretrain.py --dim 512 --n_layers 8 --out_dir ../out_of_old --batch_size 32 --max_seq_len 64"
    )
    config = json.loads((checkout.root / "out_of_old/pretrain_512.json").read_text(encoding="utf-8"))["config"]
    assert (config["hidden_size"], config["num_hidden_layers"]) == (512, 8)
    assert not (checkout.root / "out").exists()


# --- README -----------------------------------------------------------------------------------------------------------

READMES = sorted(path.name for path in ROOT.glob("README*.md"))
SCRIPT = re.compile(r"(?:(?:scripts|trainer)/\w+|\beval_llm)\.py")


def command_lines(text):
    """The Python commands of a page: lines of its shell blocks, and code within sentences."""
    blocks = re.findall(r"^```(?:bash|sh|bat)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").replace("\\", "/").splitlines()]
    for line in lines + re.findall(r"`([^`\n]+)`", prose):
        if re.match(r"(\$ )?(python|torchrun)\b", line.strip()) and SCRIPT.search(line):
            yield line.strip().removeprefix("$ ")


def parse(script, flags, monkeypatch):
    """The exit status that a script's parser ends with, or None if it takes these flags."""
    name = "eval_llm" if script.endswith("eval_llm.py") else script.removesuffix(".py").replace("/", ".")
    monkeypatch.setattr(sys, "argv", [script, *flags])
    try:
        importlib.import_module(name).parse_args()
    except SystemExit as end:
        return end.code
    return None


@pytest.mark.parametrize("page", READMES)
def test_commands_of_the_readme_are_understood(page, monkeypatch, capsys):
    lines = list(command_lines((ROOT / page).read_text(encoding="utf-8")))
    assert len(lines) >= 5
    for line in lines:
        words = [word for word in shlex.split(line, comments=True) if word != "..."]
        place = next(i for i, word in enumerate(words) if SCRIPT.fullmatch(word))
        assert (ROOT / words[place]).exists(), line
        expected = 0 if "--help" in words else None
        assert parse(words[place], words[place + 1 :], monkeypatch) == expected, f"{line}\n{capsys.readouterr().err}"


def test_an_unknown_flag_is_noticed(monkeypatch):
    assert parse("trainer/train_pretrain.py", ["--no_such_flag", "1"], monkeypatch) == 2


@pytest.mark.parametrize("page", READMES)
def test_scripts_of_the_readme_have_help(page, monkeypatch, capsys):
    scripts = sorted(set(SCRIPT.findall((ROOT / page).read_text(encoding="utf-8"))))
    scripts = [name for name in scripts if "__main__" in (ROOT / name).read_text(encoding="utf-8")]
    assert scripts
    for name in scripts:
        assert parse(name, ["--help"], monkeypatch) == 0, name
        assert "usage:" in capsys.readouterr().out
