"""More than one process: FSDP2 and two "machines" train what one process trains; docs/scale_out.md says what is so."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from inside import run_inside

from conftest import ROOT
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_model, read_sidecar, read_state_dict
from scripts import train_fsdp
from scripts.chaos_train import free_port
from trainer import train_full_sft, train_pretrain
from trainer.memory import estimate

DOC = (ROOT / "docs/scale_out.md").read_text(encoding="utf-8")
TINY = "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 4 --max_seq_len 96 --packing 0 --epochs 2".split()
TINY += "--device cpu --dtype float32 --log_interval 1".split()
ROWS = 41  # 5 updates of 8 and one of 1, in which the second of two processes has none


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pretrain.jsonl"
    with open(ROOT / "dataset/sample/pretrain.jsonl", encoding="utf-8") as file:
        path.write_text("".join([line for line in file if len(line) < 90][:ROWS]), encoding="utf-8")
    return path


def flags(folder, data, *more):
    places = ["--save_dir", folder / "out", "--checkpoint_dir", folder / "checkpoints", "--cache_dir", "none"]
    return [*map(str, [*TINY, "--data_path", data, *places, *more])]


def torchrun(script, flags, *how):
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, how), str(ROOT / script), *flags]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "cwd": ROOT}
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **how)


def finished(*processes):
    """Their output, once all have ended; one that fails takes the others with it instead of being waited for."""
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)[-3000:]
    return "\n".join(outputs)


def fsdp(folder, data, processes, *more):
    how = "--nproc_per_node", processes, "--master_port", free_port()
    return finished(torchrun("scripts/train_fsdp.py", flags(folder, data, *more), *how))


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def spread(tmp_path_factory, data):
    """(folder, output) of a run of two processes under FSDP2."""
    folder = tmp_path_factory.mktemp("fsdp")
    more = ["--batch_size", 2, "--accumulation_steps", 2, "--save_interval", 4, "--gradient_checkpointing", 1]
    output = fsdp(folder, data, 2, *more)
    assert f"data: {ROWS} rows" in output
    return folder, output


@pytest.mark.slow
def test_fsdp_trains_what_one_process_trains(spread, data, tmp_path):
    run_inside("trainer/train_pretrain.py", *flags(tmp_path, data, "--batch_size", 8))
    whole = read_state_dict(tmp_path / "out/pretrain_32.pth")
    assert largest_difference(whole, read_state_dict(spread[0] / "out/fsdp_32.pth")) < 1e-4
    fresh = MiniMindForCausalLM(load_model(tmp_path / "out/pretrain_32.pth").config).state_dict()
    assert largest_difference(whole, fresh) > 1e-2  # it has learnt something


@pytest.mark.slow
def test_fsdp_leaves_each_process_half(spread):
    held, total = re.search(r"holds ([\d,]+) of ([\d,]+)", spread[1]).groups()
    held, total = int(held.replace(",", "")), int(total.replace(",", ""))
    assert held == pytest.approx(total / 2, rel=0.02)
    newest = train_fsdp.checkpoints(spread[0] / "checkpoints/fsdp_32_fsdp")[-1]
    sizes = [path.stat().st_size for path in sorted(newest.glob("*.distcp"))]
    assert len(sizes) == 2 and sizes[0] == pytest.approx(sizes[1], rel=0.1)
    assert sum(sizes) > 3 * 4 * total  # weights and both moments, fp32


@pytest.mark.slow
def test_fsdp_leaves_ordinary_weights(spread, tokenizer):
    path = spread[0] / "out/fsdp_32.pth"
    model = load_model(path, tokenizer=tokenizer)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert read_sidecar(path)["stage"] == "FSDP"
    done = run_inside("eval_llm.py", "--weight", "fsdp", "--save_dir", spread[0] / "out", "--prompt", "The", cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_fsdp_resumes_with_another_number_of_processes(spread, data, tmp_path):
    """From updates 8 of 12, as if the last save had been cut off before its end."""
    folder = tmp_path / "resumed"
    shutil.copytree(spread[0], folder)
    kept = train_fsdp.checkpoints(folder / "checkpoints/fsdp_32_fsdp")
    assert [path.name for path in kept] == ["step_00000008", "step_00000012"]
    (kept[-1] / ".metadata").unlink()
    (folder / "out/fsdp_32.pth").unlink()
    output = fsdp(folder, data, 1, "--batch_size", 8, "--from_resume", 1)
    assert "8 updates done" in output and "update 9/12" in output and "update 8/12" not in output
    assert largest_difference(*(read_state_dict(f / "out/fsdp_32.pth") for f in (spread[0], folder))) < 1e-4


def test_fsdp_refuses_what_it_does_not_do(capsys):
    with pytest.raises(SystemExit):
        train_fsdp.parse_args(["--patience", "3", "--hidden_size", "64", "--max_steps", "4"])
    assert "error: --patience: not in this example" in capsys.readouterr().err


def test_fsdp_without_torchrun_says_how(tmp_path, data):
    done = run_inside("scripts/train_fsdp.py", *flags(tmp_path, data))
    assert done.returncode == 2 and "torchrun --nproc_per_node 2" in done.stderr


@pytest.mark.slow
def test_two_machines_are_two_processes(data, tmp_path):
    """Two torchrun that meet on loopback, as docs/scale_out.md shows it, against one torchrun with two processes."""
    how = "--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"
    apart = flags(tmp_path / "apart", data, "--batch_size", 4)
    finished(*(torchrun("trainer/train_pretrain.py", apart, *how) for _ in range(2)))
    together = flags(tmp_path / "together", data, "--batch_size", 4)
    finished(torchrun("trainer/train_pretrain.py", together, "--nproc_per_node", 2, "--master_port", free_port()))
    apart, together = (read_state_dict(tmp_path / name / "out/pretrain_32.pth") for name in ("apart", "together"))
    assert largest_difference(apart, together) <= 1e-6


# --- docs/scale_out.md ------------------------------------------------------------------------------------------------


def commands():
    return [line.strip() for line in DOC.splitlines() if re.match(r" {4}(torchrun|python) ", line)]


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_page_are_understood(command):
    """The script is there and takes the flags; torchrun takes those before it."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[at]).exists()
    parsers = {"train_pretrain": train_pretrain, "train_full_sft": train_full_sft, "train_fsdp": train_fsdp}
    name = words[at].split("/")[-1].removesuffix(".py")
    if name in parsers:
        parsers[name].parse_args(words[at + 1 :])
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        assert get_args_parser().parse_args(words[1:]).training_script == words[at]


def test_page_shows_commands():
    assert len(commands()) >= 8


BILLION = MiniMindConfig(hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=4)


def test_arithmetic_of_the_page():
    """Its parameters, its bytes per parameter, and what trainer.memory says before such a run."""
    with torch.device("meta"):
        model = MiniMindForCausalLM(BILLION)
    parameters = sum(p.numel() for p in model.parameters())
    assert f"{parameters:,} parameters" in DOC and f"MLP of {BILLION.intermediate_size:,}" in DOC
    assert f"{sum(p.numel() for p in model.model.layers[0].parameters()) / 1e6:.1f} million" in DOC
    per_token = 28 * BILLION.hidden_size + 8 * BILLION.intermediate_size
    assert f"{per_token:,} bytes" in DOC and f"{24 * per_token * 16384 / 1e9:.1f} GB" in DOC
    rows = {line.split("|")[1].strip(" *"): re.findall(r"\d+\.\d", line) for line in DOC.splitlines() if "|" in line}
    sharded = [f"{16 * parameters / n / 1e9:.1f}" for n in (1, 2, 4, 8)]
    assert rows["weights, gradients, moments"] == sharded
    for checkpointing, kind in ((1, "checkpointing"), (0, "without checkpointing")):
        args = {"dtype": "bfloat16", "device": "cuda", "optimizer": "adamw", "batch_size": 8, "max_seq_len": 2048}
        args |= {"packing": 0, "gradient_checkpointing": checkpointing}
        parts = estimate(BILLION, SimpleNamespace(**args), parameters, parameters)
        claimed = float(rows[f"activations and loss, {kind}"][0])
        assert claimed == pytest.approx((parts["activations"] + parts["logits"]) / 1e9, abs=0.06)
    for first, second, total in (
        ("buckets, or gathered blocks", "activations and loss, checkpointing", "together, checkpointing"),
        ("buckets, or gathered blocks", "activations and loss, without checkpointing", "together, without"),
    ):
        sums = [sum(map(float, column)) for column in zip(sharded, rows[first], rows[second], strict=True)]
        assert [float(x) for x in rows[total]] == pytest.approx(sums, abs=0.11)


def kept_bytes(layers, rows):
    """What autograd keeps for the backward pass under bf16 autocast, the parameters themselves left out."""
    config = MiniMindConfig(hidden_size=256, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2)
    model, kept = MiniMindForCausalLM(config).train(), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other tensor takes its place
        return tensor

    ids = torch.randint(3, 6400, (rows, 64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids, return_logits=False)
    return sum(storage.nbytes() for storage in kept.values()), config


def test_activations_of_the_page():
    """28 H + 8 F bytes per token and layer: of two more layers and four more rows, so that all else drops out."""
    grows = [kept_bytes(4, rows)[0] - kept_bytes(2, rows)[0] for rows in (2, 6)]
    config = kept_bytes(2, 2)[1]
    per_token = (grows[1] - grows[0]) / (2 * 4 * 64)
    assert per_token == pytest.approx(28 * config.hidden_size + 8 * config.intermediate_size, rel=0.01)
