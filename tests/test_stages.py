"""The training stages as a user runs them: from any folder, interrupted, on several processes, and with mistakes."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from inside import run_inside

from conftest import ROOT, run_script
from model.model_minimind import MiniMindBlock
from model.weights import read_state_dict
from trainer.train_run import TrainRun

SIZE = ["--hidden_size", 32, "--num_hidden_layers", 2, "--num_attention_heads", 2]
SHORT = ["--batch_size", 8, "--max_seq_len", 96, "--dtype", "float32", "--device", "cpu"]
PRETRAIN, SFT = "trainer/train_pretrain.py", "trainer/train_full_sft.py"


def first_rows(name, count):
    lines = (ROOT / "dataset/sample" / name).read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(lines[:count])


def places(folder):
    return ["--save_dir", folder / "out", "--checkpoint_dir", folder / "checkpoints"]


def tree(folder):
    """The files of a folder; the run directories, named after the time, are looked at by themselves."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in files if not name.startswith("out/runs/")}


def run_folder(folder, name):
    """The directory of the newest run of that name."""
    return max((folder / "out/runs").glob(f"{name}-2*"), key=lambda path: path.stat().st_mtime_ns)


def metrics(folder, name):
    lines = (run_folder(folder, name) / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [entry for entry in map(json.loads, lines) if "event" not in entry]


def sidecar(folder, name):
    return json.loads((folder / f"out/{name}.json").read_text(encoding="utf-8"))


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small files of rows: sample text, sample conversations, and generated code rows."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("pretrain", 40), ("pretrain_val", 10), ("sft", 40), ("sft_val", 10)):
        (folder / f"{name}.jsonl").write_text(first_rows(f"{name}.jsonl", count), encoding="utf-8", newline="\n")
    made = run_inside("scripts/generate_code_sft.py", "--out", folder / "sft_code.jsonl", "--n", 40, "--seed", 1)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    """A folder with out/pretrain_32.pth."""
    folder = tmp_path_factory.mktemp("pretrained")
    done = run_inside(PRETRAIN, *SIZE, *SHORT, *places(folder), "--data_path", data / "pretrain.jsonl")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def folder(pretrained, tmp_path):
    """A folder of one's own with out/pretrain_32.pth, to fine-tune in."""
    shutil.copytree(pretrained / "out", tmp_path / "out")
    return tmp_path


def fine_tune(folder, data, *flags):
    """SFT on the generated code rows; later flags win over the ones here."""
    return run_inside(SFT, *SHORT, *places(folder), "--data_path", data / "sft_code.jsonl", *flags, cwd=folder)


# --- what a run writes, and from where it can be started --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cwd", "trainer", "dataset"),
    [(".", "trainer", "dataset"), ("trainer", ".", "../dataset"), ("scripts", "../trainer", "../dataset")],
)
def test_both_stages_from_every_folder(cwd, trainer, dataset, tmp_path):
    """With the paths that are typed there, the places to write to relative as well; SFT is told no sizes."""
    here = ROOT / cwd
    before = {"__pycache__", *os.listdir(here), *os.listdir(ROOT)}
    out = [
        "--save_dir",
        os.path.relpath(tmp_path / "out", here),
        "--checkpoint_dir",
        os.path.relpath(tmp_path / "checkpoints", here),
    ]
    short = [*SHORT, *out, "--max_steps", 2]
    first = run_script(
        f"{trainer}/train_pretrain.py", *SIZE, *short, "--data_path", f"{dataset}/sample/pretrain_val.jsonl", cwd=here
    )
    assert first.returncode == 0, first.stderr
    second = run_script(
        f"{trainer}/train_full_sft.py", *short, "--data_path", f"./{dataset}/sample/sft_val.jsonl", cwd=here
    )
    assert second.returncode == 0, second.stderr
    weights = {f"out/{name}_32{end}" for name in ("pretrain", "full_sft") for end in (".pth", ".json")}
    assert tree(tmp_path) == weights | {f"checkpoints/{name}_32_resume.pth" for name in ("pretrain", "full_sft")}
    assert {*os.listdir(here), *os.listdir(ROOT)} <= before
    assert sidecar(tmp_path, "full_sft_32")["config"]["num_attention_heads"] == 2
    assert sidecar(tmp_path, "full_sft_32")["stage"] == "Full SFT"
    assert not same_bits(*(read_state_dict(tmp_path / f"out/{name}_32.pth") for name in ("pretrain", "full_sft")))


def test_sft_starts_from_the_pretrained_weights(folder, data):
    """A learning rate of nothing leaves exactly the weights that were named."""
    done = fine_tune(folder, data, "--learning_rate", 0, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert same_bits(read_state_dict(folder / "out/pretrain_32.pth"), read_state_dict(folder / "out/full_sft_32.pth"))


def test_training_learns(folder, data):
    done = fine_tune(folder, data, "--epochs", 6, "--learning_rate", 1e-2, "--log_interval", 1)
    assert done.returncode == 0, done.stderr
    losses = [entry["loss"] for entry in metrics(folder, "full_sft_32")]
    assert losses[0] > 8 and losses[-1] < losses[0] - 2


@pytest.mark.parametrize(("spelling", "end"), [("1", "_moe"), ("True", "_moe"), ("0", ""), ("False", "")])
def test_mixture_of_experts_by_any_spelling(spelling, end, data, tmp_path):
    experts = ["--n_routed_experts", 4, "--max_steps", 1]
    flags = [*SIZE, *SHORT, *places(tmp_path), *experts, "--use_moe", spelling]
    done = run_inside(PRETRAIN, *flags, "--data_path", data / "pretrain_val.jsonl")
    assert done.returncode == 0, done.stderr
    names = {f"out/pretrain_32{end}{suffix}" for suffix in (".pth", ".json")}
    assert tree(tmp_path) == names | {f"checkpoints/pretrain_32{end}_resume.pth"}
    assert ("aux_loss:" in done.stdout) == bool(end)
    if end:  # the next stage finds it without a flag
        done = fine_tune(tmp_path, data, "--max_steps", 1)
        assert done.returncode == 0 and (tmp_path / "out/full_sft_32_moe.pth").exists(), done.stderr


def test_log_line_and_validation(data, tmp_path):
    flags = ["--data_path", data / "pretrain.jsonl", "--val_path", data / "pretrain_val.jsonl", "--log_interval", 2]
    done = run_inside(PRETRAIN, *SIZE, *SHORT, *places(tmp_path), *flags, "--epochs", 2)
    assert done.returncode == 0, done.stderr
    line = r"Epoch:\[\d/2\]\(\d+/\d+\) loss:\d+\.\d{4} ppl:[\d.]+ lr:\d\.\d+e-\d+ tokens/s:[\d,]+ ETA:\d+\.\dmin"
    assert len(re.findall(line, done.stdout)) >= 4
    validations = re.findall(r"validation: loss:([\d.]+) ppl:([\d.]+)", done.stdout)
    assert len(validations) == 2  # one per epoch
    for loss, ppl in validations:
        assert float(ppl) == pytest.approx(math.exp(float(loss)), rel=1e-3)
    recorded = [entry["val_loss"] for entry in metrics(tmp_path, "pretrain_32") if "val_loss" in entry]
    assert [f"{loss:.4f}" for loss in recorded] == [loss for loss, _ in validations]
    assert sidecar(tmp_path, "pretrain_32")["metrics"]["val_loss"] == recorded[-1]


# --- switches that must not change the result -------------------------------------------------------------------------


def test_packing_changes_nothing_but_time(folder, data):
    """All documents in one batch, so that both ways make the same updates."""
    long = ["--max_seq_len", 512, "--batch_size", 64]
    weights, losses = {}, {}
    for pack in (0, 1):
        done = fine_tune(
            folder, data, *long, "--packing", pack, "--epochs", 6, "--log_interval", 1, "--save_weight", f"p{pack}"
        )
        assert done.returncode == 0, done.stderr
        weights[pack] = read_state_dict(folder / f"out/p{pack}_32.pth")
        losses[pack] = [entry["loss"] for entry in metrics(folder, f"p{pack}_32")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) > 5
    assert largest_difference(weights[0], weights[1]) < 2e-5
    assert largest_difference(weights[0], read_state_dict(folder / "out/pretrain_32.pth")) > 1e-3


def test_gradient_checkpointing_changes_nothing_but_time(folder, data, monkeypatch):
    calls, forward = [], MiniMindBlock.forward
    monkeypatch.setattr(MiniMindBlock, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k))
    weights, counts = [], []
    for on in (0, 1):
        done = fine_tune(folder, data, "--gradient_checkpointing", on, "--epochs", 1, "--save_weight", f"g{on}")
        assert done.returncode == 0, done.stderr
        weights.append(read_state_dict(folder / f"out/g{on}_32.pth"))
        counts.append(len(calls) - sum(counts))
    assert counts[1] == 2 * counts[0] > 0  # each block is computed again on the way back
    assert largest_difference(*weights) < 2e-5


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_save_dtype(dtype, folder, data):
    done = fine_tune(folder, data, "--save_dtype", dtype, "--max_steps", 1)
    assert done.returncode == 0, done.stderr
    state = torch.load(folder / "out/full_sft_32.pth", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {getattr(torch, dtype)}
    resume = torch.load(folder / "checkpoints/full_sft_32_resume.pth", weights_only=True)
    assert {tensor.dtype for tensor in resume["model"].values()} == {torch.float32}


@pytest.mark.slow
def test_two_processes_equal_one(folder, data):
    flags = [*SHORT, *places(folder), "--data_path", data / "sft_code.jsonl", "--epochs", 2, "--log_interval", 1]
    one = run_inside(SFT, *flags, "--save_weight", "one")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    two = run_script(*launch, SFT, *flags, "--save_weight", "two", "--batch_size", 4)
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    assert "2 process(es)" in two.stdout and two.stdout.count("validation") == one.stdout.count("validation")
    assert largest_difference(*(read_state_dict(folder / f"out/{name}_32.pth") for name in ("one", "two"))) < 2e-5
    losses = [[entry["loss"] for entry in metrics(folder, f"{name}_32")] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) > 5


@pytest.mark.slow
def test_wandb_without_a_key_writes_to_the_disk(folder, data, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    flags = [*SHORT, *places(folder), "--data_path", data / "sft_code.jsonl", "--max_steps", 1, "--use_wandb"]
    done = run_script(SFT, *flags)
    assert done.returncode == 0, done.stderr
    assert [
        path for path in run_folder(folder, "full_sft_32").glob("wandb/offline-run-*/*.wandb") if path.stat().st_size
    ]


# --- interruptions ----------------------------------------------------------------------------------------------------


def until_interrupted(command, resume_file, with_signal):
    """Start a training run, send it a signal after its first save; returns (status, what it printed)."""
    default = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  a background job ignores Ctrl-C
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=default,
    )
    deadline = time.monotonic() + 120
    while not resume_file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(with_signal)
    printed = process.communicate(timeout=60)[0]
    return process.returncode, printed


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    flags = ["--epochs", 4, "--batch_size", 2, "--dropout", 0.1, "--log_interval", 1]
    flags = [PRETRAIN, *SIZE, *SHORT, "--data_path", data / "pretrain.jsonl", *flags]
    done = run_script(*flags, *places(folder))
    assert done.returncode == 0, done.stderr
    return flags, folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_interrupted_run_ends_with_the_same_bits(name, uninterrupted, tmp_path):
    flags, whole = uninterrupted
    resume_file = tmp_path / "checkpoints/pretrain_32_resume.pth"
    number = getattr(signal, name)
    status, printed = until_interrupted([*flags, *places(tmp_path), "--save_interval", 1], resume_file, number)
    if name == "SIGKILL":
        assert status == -number
    else:
        assert status == 130 and "--from_resume 1" in printed and "Traceback" not in printed, printed
    state = torch.load(resume_file, weights_only=True)
    steps = state["args"]["epochs"] * math.ceil(state["data"]["packed_rows"] / 2)
    assert (
        0 < state["step"] + state["epoch"] * math.ceil(state["data"]["packed_rows"] / 2) < steps - 1
    )  # there was much left to do
    done = run_script(*flags, *places(tmp_path), "--from_resume", 1)
    assert done.returncode == 0, done.stderr
    assert "resumed pretrain_32_resume.pth" in done.stdout
    assert same_bits(*(read_state_dict(place / "out/pretrain_32.pth") for place in (whole, tmp_path)))
    results = [
        [
            {k: v for k, v in entry.items() if k in ("update", "epoch", "step", "loss", "lr")}
            for entry in metrics(place, "pretrain_32")
        ]
        for place in (whole, tmp_path)
    ]
    assert results[0] == results[1]


def test_resume_on_data_with_one_short_text_more_is_refused(data, tmp_path):
    """It may well fit into a gap, so that there are no more rows than before, and still every row would be another."""
    copied = tmp_path / "texts.jsonl"
    shutil.copy(data / "pretrain.jsonl", copied)
    flags = [*SIZE, *SHORT, *places(tmp_path), "--data_path", copied, "--batch_size", 2, "--save_interval", 1]
    first = run_inside(PRETRAIN, *flags, "--max_steps", 2)
    assert first.returncode == 0, first.stderr
    with copied.open("a", encoding="utf-8") as file:
        file.write('{"text": "one"}\n')
    done = run_inside(PRETRAIN, *flags, "--max_steps", 4, "--from_resume", 1)
    assert done.returncode == 2 and "(now " in done.stderr and "tokens " in done.stderr


@pytest.mark.parametrize("script, name", [(PRETRAIN, "pretrain"), (SFT, "sft")])
def test_a_stream_trains_and_resumes_bit_for_bit(script, name, data, tmp_path, monkeypatch):
    flags = [*SIZE, *SHORT, "--data_path", data / f"{name}.jsonl", "--batch_size", 2, "--streaming", 1]
    flags += ["--from_weight", "none", "--save_weight", "w", "--save_interval", 3, "--dropout", 0.1]
    flags += ["--max_steps", 6]
    whole = run_inside(script, *flags, *places(tmp_path / "whole"))
    assert whole.returncode == 0 and "tokenised on the way" in whole.stdout, whole.stderr
    save = TrainRun.save

    def save_then_stop(self, step):
        save(self, step)
        if self.monitor.done == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainRun, "save", save_then_stop)
        assert run_inside(script, *flags, *places(tmp_path / "parts")).returncode == 130
    done = run_inside(script, *flags, *places(tmp_path / "parts"), "--from_resume", 1)
    assert done.returncode == 0 and "epoch 1, step 3/6" in done.stdout, done.stderr
    assert same_bits(*(read_state_dict(tmp_path / part / "out/w_32.pth") for part in ("whole", "parts")))


def test_a_stream_without_its_length_is_refused(data, tmp_path):
    done = run_inside(PRETRAIN, *SIZE, *places(tmp_path), "--data_path", data / "pretrain.jsonl", "--streaming", 1)
    assert done.returncode == 2 and "say by --max_steps" in done.stderr


# --- mistakes ---------------------------------------------------------------------------------------------------------


def check_mistake(done, *words):
    """Status 2, one line that begins with `error:` (argparse puts the usage before it), and what it must say."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert re.match(r"(error|\S+\.py: error): ", line), line
    if not done.stderr.startswith("usage:"):
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in line, line


SFT_MISTAKES = {
    "no such file": (["--data_path", "sft_mini_512.jsonl"], ["sft_mini_512.jsonl", "dataset/sample/sft.jsonl"]),
    "no such held-back file": (["--val_path", "nothing.jsonl"], ["nothing.jsonl"]),
    "no such weights": (["--from_weight", "reason"], ["reason_*.pth", "--save_dir"]),
    "other size": (["--hidden_size", 64], ["pretrain_64.pth", "there is pretrain_32.pth"]),
    "preset of another size": (["--preset", "base"], ["pretrain_768.pth", "there is pretrain_32.pth"]),
    "unknown preset": (["--preset", "huge"], ["'huge'", "tiny, small, base"]),
    "other depth": (["--num_hidden_layers", 3], ["num_hidden_layers 2, not 3", "pretrain_32.json"]),
    "not a mixture": (["--use_moe", 1], ["there is pretrain_32.pth"]),
    "no epochs": (["--epochs", 0], ["--epochs", "above 0"]),
    "not a switch": (["--packing", 2], ["--packing", "neither 0 nor 1"]),
    "no such tokenizer": (["--tokenizer_path", "nowhere"], ["nowhere"]),
    "half precision on a CPU": (["--dtype", "float16"], ["float16", "bfloat16 or auto"]),
    "too short for every reply": (["--max_seq_len", 5], ["within 5 tokens", "raise --max_seq_len"]),
    "unknown flag": (["--learning_rat", 1], ["--learning_rat"]),
}


@pytest.mark.parametrize("mistake", SFT_MISTAKES)
def test_a_mistake_gives_one_clear_line(mistake, folder, data):
    flags, words = SFT_MISTAKES[mistake]
    before = tree(folder)
    check_mistake(fine_tune(folder, data, *flags), *words)
    assert tree(folder) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_cuda_here(folder, data):
    check_mistake(fine_tune(folder, data, "--device", "cuda"), "--device cuda", "no cuda here")


BAD_ROWS = {
    '{"conversations": [': "broken JSON",
    '{"conversations": [{"role": "robot", "content": "a"}]}': "robot",
    '{"conversations": [{"role": "user", "content": null}, {"role": "assistant", "content": "a"}]}': "content",
    '{"chat": []}': "conversations",
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_bad_row_is_named_or_skipped_and_counted(bad, folder, data):
    rows = first_rows("sft.jsonl", 6).splitlines(keepends=True)
    path = folder / "rows.jsonl"
    path.write_text("".join([*rows[:3], bad + "\n", *rows[3:]]), encoding="utf-8")
    check_mistake(fine_tune(folder, data, "--data_path", path), "rows.jsonl:4: ", BAD_ROWS[bad])
    long_enough = ["--max_seq_len", 340, "--max_steps", 1]
    done = fine_tune(folder, data, "--data_path", path, "--on_bad_row", "skip", *long_enough)
    assert done.returncode == 0, done.stderr
    assert "6 rows" in done.stdout and "1 bad rows skipped" in done.stdout and "at line 4" in done.stderr
    assert sidecar(folder, "full_sft_32")["data"]["bad_rows"] == 1


def test_empty_and_useless_files(folder, data):
    path = folder / "sft_empty.jsonl"
    path.touch()
    check_mistake(fine_tune(folder, data, "--data_path", path), "sft_empty.jsonl is empty", "dataset/sample/sft.jsonl")
    path.write_text("\n\n", encoding="utf-8")
    check_mistake(fine_tune(folder, data, "--data_path", path), "holds no rows")
    path.write_text("{}\n{}\n", encoding="utf-8")
    check_mistake(fine_tune(folder, data, "--data_path", path, "--on_bad_row", "skip"), "none of 2 rows", ":1: ")
    check_mistake(fine_tune(folder, data, "--data_path", data / "pretrain.jsonl"), "pretrain.jsonl:1: ")


def test_pretraining_on_conversations_is_said(data, tmp_path):
    done = run_inside(PRETRAIN, *SIZE, *SHORT, *places(tmp_path), "--data_path", data / "sft.jsonl")
    check_mistake(done, "sft.jsonl:1: ", "text")


def test_width_that_heads_cannot_share(data, tmp_path):
    done = run_inside(PRETRAIN, *SHORT, *places(tmp_path), "--data_path", data / "pretrain.jsonl", "--hidden_size", 33)
    check_mistake(done, "33")


@pytest.mark.slow
def test_a_mistake_ends_a_real_process_alike(folder, data):
    done = run_script(SFT, *places(folder), "--data_path", "sft_mini_512.jsonl", "--from_weight", "none", cwd=ROOT)
    check_mistake(done, "sft_mini_512.jsonl", "dataset/sample/sft.jsonl")


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("moe", [0, 1])
def test_compiled_is_the_same_and_compiles_at_most_three_times(moe, data, tmp_path):
    """Over two epochs whose last batch is smaller, with a validation after each, and after a resume."""
    from torch._dynamo.utils import counters

    flags = [*SIZE, *SHORT, *places(tmp_path), "--data_path", data / "sft_code.jsonl", "--from_weight", "none"]
    flags += ["--use_moe", moe, "--batch_size", 3, "--val_path", data / "sft_val.jsonl", "--save_interval", 1]
    weights = []
    for name, compiled in (("eager", 0), ("compiled", 1)):
        torch.compiler.reset()
        counters.clear()
        done = run_inside(SFT, *flags, "--epochs", 2, "--use_compile", compiled, "--save_weight", name)
        assert done.returncode == 0, done.stderr
        assert ("compiled: " in done.stdout) == bool(compiled)
        assert (1 if compiled else 0) <= counters["stats"]["unique_graphs"] <= 3 * compiled
        weights.append(read_state_dict(tmp_path / f"out/{name}_32{'_moe' if moe else ''}.pth"))
    assert largest_difference(*weights) < 2e-5
    again = run_inside(
        SFT, *flags, "--epochs", 2, "--use_compile", "auto", "--save_weight", "compiled", "--from_resume", 1
    )
    assert (
        again.returncode == 0 and "compiled: " in again.stdout
    )  # what the checkpoint says, not what auto would choose


def test_no_compiler_means_eager_and_a_message(data, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.compile", lambda function: broken)
    flags = [*SIZE, *SHORT, *places(tmp_path), "--data_path", data / "sft_code.jsonl", "--from_weight", "none"]
    done = run_inside(SFT, *flags, "--max_steps", 1, "--use_compile", 1)
    assert done.returncode == 0, done.stderr
    assert "not compiled, so slower" in done.stdout and "no C++ compiler" in done.stdout


def broken(x):
    raise RuntimeError("no C++ compiler found\nand more of it")


@pytest.mark.parametrize("generation", ["v2", "v3"])
def test_minimind_is_continued(generation, data, tmp_path):
    """Its resume file beside its weights: the stage goes on, and the file stays until there is a newer one."""
    if not os.environ.get("MINIMIND_FILES"):
        pytest.skip("MINIMIND_FILES does not name the folder with files that MiniMind wrote")
    files = Path(os.environ["MINIMIND_FILES"]) / generation
    for name, folder in (("full_sft_64.pth", "out"), ("full_sft_64_resume.pth", "checkpoints")):
        (tmp_path / folder).mkdir()
        shutil.copyfile(files / name, tmp_path / folder / name)
    flags = ["--from_weight", "full_sft", "--from_resume", 1, "--max_steps", 3, "--save_interval", 3]
    done = run_inside(SFT, *SHORT, *places(tmp_path), "--data_path", data / "sft_code.jsonl", *flags)
    assert done.returncode == 0, done.stderr
    assert "continuing MiniMind's full_sft_64_resume.pth" in done.stdout and "is now" not in done.stdout
    kept = torch.load(tmp_path / "checkpoints/full_sft_64_resume.1.pth", weights_only=True)
    assert "rng" not in kept  # MiniMind's, the one before ours
    state = torch.load(tmp_path / "checkpoints/full_sft_64_resume.pth", weights_only=True)
    saved = torch.load(files / "full_sft_64_resume.pth", weights_only=True)
    before = {float(moments["step"]) for moments in saved["optimizer"]["state"].values()}
    after = {float(moments["step"]) for moments in state["optimizer"]["state"].values()}
    config = json.loads((run_folder(tmp_path, "full_sft_64") / "config.json").read_text(encoding="utf-8"))
    assert {b - a for a in before for b in after} == {3 - config["updates_before"]}  # its moments go on
    assert (tmp_path / "out/full_sft_64.prev.pth").exists()
