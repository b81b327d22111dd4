"""Weight files: whole or not at all, never mismatched, never executed, and recognised without a sidecar.

python -m pytest tests/test_weights.py
"""

import json
import os
import pickle

import pytest
import torch

from model import weights
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.presets import V3, V3_MOE
from model.weights import (
    atomic_write,
    config_dict,
    detect_config,
    file_digest,
    find_weights,
    load_config,
    load_model,
    load_state,
    read_sidecar,
    read_state_dict,
    save_weights,
    sidecar_path,
    update_sidecar,
    weight_path,
)

V = 97
KINDS = {
    "v2": {"num_key_value_heads": 2},
    "v3": {**V3, "head_dim": 12, "intermediate_size": 96},
    "v2-moe": {"use_moe": True, "n_routed_experts": 3, "n_shared_experts": 2},
    "v3-moe": {**V3, **V3_MOE, "n_routed_experts": 6},
}
IDS = torch.arange(3, 17)[None]


def tiny(kind="v2", seed=0, **changes):
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": V, **KINDS[kind], **changes}
    torch.manual_seed(seed)
    return MiniMindForCausalLM(MiniMindConfig(**fields)).eval()


def save(path, model, **options):
    save_weights(path, model.state_dict(), model.config, **options)
    return path


def fail(*args, **kwargs):
    raise AssertionError(f"called with {args} {kwargs}")


def same(model, other):
    state, expected = model.state_dict(), other.state_dict()
    return list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in state)


class SmallTokenizer:
    """As much of a tokenizer as the digest needs."""

    def __init__(self, size, first="a"):
        self.vocabulary = {f"{first}{i}": i for i in range(size)}

    def __len__(self):
        return len(self.vocabulary)

    def get_vocab(self):
        return dict(self.vocabulary)


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_are_those_of_minimind(tmp_path):
    assert weight_path(tmp_path, "pretrain", MiniMindConfig()) == tmp_path / "pretrain_512.pth"
    assert (
        weight_path(tmp_path, "full_sft", MiniMindConfig(hidden_size=640, use_moe=True)).name == "full_sft_640_moe.pth"
    )
    assert sidecar_path(tmp_path / "a.b_512.pth") == tmp_path / "a.b_512.json"


@pytest.fixture
def folder(tmp_path):
    """Weights of several sizes and names; the later in the list the newer."""
    names = ["full_sft_512.pth", "full_sft_768.pth", "full_sft_640_moe.pth", "full_sft_512_moe.pth"]
    names += ["full_sft_code_512.pth", "full_sft_256.prev.pth", "full_sft_256_resume.pth", "full_sft_256.pth.ab.tmp"]
    for age, name in enumerate(names):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    return tmp_path


def test_find_weights(folder):
    assert find_weights(folder, "full_sft").name == "full_sft_512_moe.pth"  # the newest of that very name
    assert find_weights(folder, "full_sft", use_moe=False).name == "full_sft_768.pth"
    assert find_weights(folder, "full_sft", 512).name == "full_sft_512_moe.pth"
    assert find_weights(folder, "full_sft", 512, False).name == "full_sft_512.pth"
    assert find_weights(folder, "full_sft", use_moe=True, hidden_size=640).name == "full_sft_640_moe.pth"
    assert find_weights(folder, "full_sft_code").name == "full_sft_code_512.pth"
    os.utime(folder / "full_sft_512.pth", (5000, 5000))
    assert find_weights(folder, "full_sft").name == "full_sft_512.pth"


def test_find_weights_says_what_is_there(folder):
    with pytest.raises(FileNotFoundError) as error:
        find_weights(folder, "full_sft", 1024, True)
    assert str(folder / "full_sft_1024_moe.pth") in str(error.value)
    assert "full_sft_768.pth" in str(error.value) and "--hidden_size" in str(error.value)
    assert "code" not in str(error.value) and "prev" not in str(error.value) and "resume" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="dpo_.*train the dpo stage first"):
        find_weights(folder, "dpo")
    with pytest.raises(FileNotFoundError, match="train the dpo stage first"):
        find_weights(folder / "nowhere", "dpo")


# --- save and load ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"mlp_gate": True, "hidden_act": "gelu"}])
@pytest.mark.parametrize("kind", KINDS)
def test_load_gives_back_what_was_saved_bit_for_bit(kind, changes, tmp_path):
    model = tiny(kind, **changes)
    path = save(weight_path(tmp_path, "pretrain", model.config), model)
    loaded = load_model(path, say=fail)
    assert same(loaded, model) and not loaded.training
    assert config_dict(loaded.config) == config_dict(model.config)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert config_dict(load_config(path, say=fail)) == config_dict(model.config)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([path.name, sidecar_path(path).name])


def test_file_is_a_plain_state_dict_that_holds_tied_weights_once(tmp_path):
    model = tiny(vocab_size=5000)
    path = save(tmp_path / "a_64.pth", model)
    state = torch.load(path, weights_only=True)
    assert type(state) is dict and list(state) == list(model.state_dict())
    size = sum(p.numel() for p in model.parameters()) * 4
    assert size < path.stat().st_size < size + 50_000
    assert path.stat().st_mode & 0o777 == 0o666 & ~weights._umask()


def test_sidecar_says_what_the_weights_are(tmp_path):
    model = tiny("v3-moe")
    path = save(tmp_path / "a_64_moe.pth", model, stage="pretrain", metrics={"loss": 2.5}, data={"path": "中文.jsonl"})
    text = sidecar_path(path).read_text(encoding="utf-8")
    sidecar = json.loads(text)
    assert "中文" in text and text.endswith("}\n") and b"\r" not in sidecar_path(path).read_bytes()
    assert sidecar["digest"] == file_digest(path) and len(sidecar["digest"]) == 64
    assert sidecar["config"]["hidden_size"] == 64 and sidecar["config"]["num_experts_per_tok"] == 1
    assert set(sidecar["config"]) == set(MiniMindConfig.__init__.__annotations__)  # nothing of transformers' own
    assert (sidecar["stage"], sidecar["metrics"], sidecar["dtype"]) == ("pretrain", {"loss": 2.5}, "float32")
    assert sidecar["versions"]["torch"] == torch.__version__
    update_sidecar(path, metrics={"loss": 2.0})
    assert read_sidecar(path) == {**sidecar, "metrics": {"loss": 2.0}}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_halves_the_file_and_is_raised_again(dtype, tmp_path):
    model = tiny(vocab_size=5000)
    full, half = save(tmp_path / "a_64.pth", model), save(tmp_path / "b_64.pth", model, dtype=dtype)
    assert half.stat().st_size < 0.55 * full.stat().st_size
    loaded = load_model(half)
    assert loaded.dtype == torch.float32 and read_sidecar(half)["dtype"] == dtype
    assert {tensor.dtype for tensor in read_state_dict(half).values()} == {torch.float32}
    model.to(getattr(torch, dtype)).float()
    assert same(loaded, model)


def test_saving_leaves_the_model_as_it_is(tmp_path):
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(tmp_path / "a_64.pth", model, dtype="float16")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight.dtype == torch.float32


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_sidecar_of_other_weights_is_refused(tmp_path):
    one, two = save(tmp_path / "a_64.pth", tiny()), save(tmp_path / "b_64.pth", tiny(seed=1))
    os.replace(sidecar_path(one), sidecar_path(two))
    for use in (load_model, load_config, read_sidecar):
        with pytest.raises(ValueError, match="b_64.json describes other weights than b_64.pth"):
            use(two)
    told = []
    load_model(one, say=told.append)  # without one it is detected
    assert "no sidecar" in told[0]


@pytest.mark.parametrize("text", ['{"digest": ', "[]", "\udcff"])
def test_broken_sidecar_is_refused_by_name(text, tmp_path):
    path = save(tmp_path / "a_64.pth", tiny())
    sidecar_path(path).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="a_64.json .*remove it"):
        load_model(path)


def test_previous_pair_is_kept(tmp_path):
    path, models = tmp_path / "a_64.pth", [tiny(seed=seed) for seed in range(3)]
    for model in models:
        save(path, model, keep_previous=True)
    assert same(load_model(path, say=fail), models[2])
    assert same(load_model(tmp_path / "a_64.prev.pth", say=fail), models[1])
    save(path, models[0])
    assert same(load_model(tmp_path / "a_64.prev.pth", say=fail), models[1])  # only when asked for
    assert len(list(tmp_path.iterdir())) == 4


class PowerCut(BaseException):
    """Neither an Exception nor an OSError, so that nothing can handle it by accident."""


def cut_at(monkeypatch, number):
    """Raise instead of the so-manyeth replace; number 0 tears the weight file while it is being written."""
    replace, write, count = os.replace, torch.save, [0]

    def replace_or_die(*args):
        count[0] += 1
        if count[0] == number:
            raise PowerCut
        replace(*args)

    def tear(tensors, file):
        write(tensors, file)
        file.truncate(1000)
        raise PowerCut

    monkeypatch.setattr(os, "replace", replace_or_die)
    if number == 0:
        monkeypatch.setattr(torch, "save", tear)


def save_with_cut(monkeypatch, number, path, model, **options):
    """True if the save was cut off."""
    with monkeypatch.context() as patch:
        cut_at(patch, number)
        try:
            save(path, model, **options)
        except PowerCut:
            return True
    return False


@pytest.mark.parametrize("keep_previous", [False, True])
@pytest.mark.parametrize("first", range(6))
@pytest.mark.parametrize("second", range(7))
def test_every_crash_leaves_a_pair_that_loads(first, second, keep_previous, tmp_path, monkeypatch):
    """Two crashes one after the other, at each pair of places; then a save that gets through."""
    models, path = [tiny(seed=seed) for seed in range(4)], tmp_path / "a_64.pth"
    save(path, models[0])
    alive = models[0]
    for model, number in ((models[1], first), (models[2], second)):
        cut = save_with_cut(monkeypatch, number, path, model, keep_previous=keep_previous)
        loaded = load_model(path, say=fail)  # say: a missing sidecar would be told
        assert same(loaded, model) or (cut and same(loaded, alive))
        alive = model if same(loaded, model) else alive
        assert not list(tmp_path.glob("*.tmp"))
    save(path, models[3], keep_previous=True)
    assert same(load_model(path, say=fail), models[3])
    assert same(load_model(tmp_path / "a_64.prev.pth", say=fail), alive)
    assert len(list(tmp_path.iterdir())) == 4


def test_the_cuts_reach_every_replace(tmp_path, monkeypatch):
    path = save(tmp_path / "a_64.pth", tiny())
    cuts = [save_with_cut(monkeypatch, n, path, tiny(seed=1), keep_previous=True) for n in range(8)]
    assert cuts == [True] * 7 + [False]
    # weights new, sidecar old, its successor waiting: facts added now go to the right one
    save_with_cut(monkeypatch, 3, path, tiny(seed=2))
    assert same(load_model(path, say=fail), tiny(seed=2))
    update_sidecar(path, metrics={"loss": 1.0})
    assert read_sidecar(path)["metrics"] == {"loss": 1.0}


@pytest.mark.parametrize("number", range(4))
def test_crash_of_the_first_save_leaves_nothing_that_looks_whole(number, tmp_path, monkeypatch):
    path = tmp_path / "a_64.pth"
    cut = save_with_cut(monkeypatch, number, path, tiny())
    assert cut
    if path.exists():
        assert same(load_model(path, say=fail), tiny())
    else:
        with pytest.raises(FileNotFoundError):
            find_weights(tmp_path, "a")
    assert same(load_model(save(path, tiny(seed=1)), say=fail), tiny(seed=1))


@pytest.mark.parametrize("place", ["mkstemp", "replace", "save"])
def test_no_permission_or_no_space_keeps_the_old_pair(place, tmp_path, monkeypatch):
    path = save(tmp_path / "a_64.pth", tiny())

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        module = {"mkstemp": weights.tempfile, "replace": os, "save": torch}[place]
        patch.setattr(module, place, refuse)
        with pytest.raises(PermissionError):
            save(path, tiny(seed=1))
    assert same(load_model(path, say=fail), tiny()) and len(list(tmp_path.iterdir())) == 2


def test_atomic_write_makes_folders_and_replaces_in_one_step(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    for text in ("one", "two"):
        atomic_write(path, lambda temporary, text=text: open(temporary, "w").write(text))
        assert path.read_text() == text
    with pytest.raises(ZeroDivisionError):
        atomic_write(path, lambda temporary: 1 / 0)
    assert path.read_text() == "two" and list(path.parent.iterdir()) == [path]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_other_sizes_are_refused_with_keys_shapes_and_flags(tmp_path):
    state = tiny("v2").state_dict()
    with pytest.raises(ValueError) as error:
        load_state(tiny("v2", num_hidden_layers=3), state, "out/a_64.pth")
    assert "out/a_64.pth" in str(error.value) and "Only in the model: model.layers.2." in str(error.value)
    assert "--num_hidden_layers" in str(error.value) and "--preset" in str(error.value)
    with pytest.raises(ValueError, match=r"q_norm|mlp\.gate\.weight.*Only in the file: .*mlp\.gate_proj"):
        load_state(tiny("v3-moe"), state, "a")
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: file \(97, 64\), model \(97, 32\)"):
        load_state(tiny("v2", hidden_size=32), state, "a")
    with pytest.raises(ValueError, match="Only in the file: model.layers.0.extra"):
        load_state(tiny("v2"), {**state, "model.layers.0.extra": torch.zeros(1)}, "a")
    del state["lm_head.weight"]  # stock files leave the tied one out
    load_state(tiny("v2"), state, "a")
    with pytest.raises(ValueError, match="Only in the model: lm_head.weight"):
        load_state(tiny("v2", tie_word_embeddings=False), state, "a")


def test_refused_weights_leave_the_model_untouched():
    model = tiny("v2", seed=5)
    with pytest.raises(ValueError):
        load_state(model, {**tiny("v2").state_dict(), "extra": torch.zeros(1)}, "a")
    assert same(model, tiny("v2", seed=5))


def test_flags_that_contradict_the_file_are_refused(tmp_path):
    path = save(tmp_path / "a_64.pth", tiny())
    for with_sidecar in (True, False):
        if not with_sidecar:
            sidecar_path(path).unlink()
        with pytest.raises(ValueError, match="a_64.pth has num_hidden_layers 2, not 16.*leave"):
            load_model(path, {"num_hidden_layers": 16}, say=str)
        config = load_config(path, {"dropout": 0.1, "inference_rope_scaling": True, "hidden_size": 64}, say=str)
        assert config.dropout == 0.1 and config.inference_rope_scaling


class Bomb:
    def __reduce__(self):
        return open, ("EXPLODED", "w")


def test_files_that_are_no_weights_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = save(tmp_path / "a_64.pth", tiny()).read_bytes()
    state = tiny().state_dict()
    files = {
        "torn.pth": (whole[: len(whole) // 2], "torn"),
        "empty.pth": (b"", "torn"),
        "text.pth": (b"hello", "another format"),
        "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        "pickle.pth": (pickle.dumps({"a": Bomb()}, protocol=2), "Python objects"),
    }
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"a": Bomb()}, tmp_path / "zip.pth")
    torch.save(tiny(), tmp_path / "model.pth")
    torch.save({"model": state, "epoch": 1}, tmp_path / "resume.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    more = {"zip.pth": "Python objects", "model.pth": "Python objects", "resume.pth": "checkpoints/", "list.pth": ""}
    for name, wanted in {**{name: text for name, (_, text) in files.items()}, **more}.items():
        for read in (read_state_dict, load_model):
            with pytest.raises(ValueError) as error:
                read(tmp_path / name)
            assert name in str(error.value) and wanted in str(error.value)
            assert "weights_only" not in str(error.value)  # torch's advice to switch the safety off
    assert not (tmp_path / "EXPLODED").exists()
    for read in (read_state_dict, load_model):
        with pytest.raises(FileNotFoundError, match="missing.pth.*train that stage first"):
            read(tmp_path / "missing.pth")


def test_wrong_tokenizer_is_refused(tmp_path):
    right, model = SmallTokenizer(V), tiny()
    facts = {"tokenizer": {"path": "my/tokenizer", "digest": weights.tokenizer_digest(right)}}
    path = save(tmp_path / "a_64.pth", model, **facts)
    load_model(path, tokenizer=right)
    with pytest.raises(ValueError, match="another tokenizer .my/tokenizer.*--tokenizer_path"):
        load_model(path, tokenizer=SmallTokenizer(V, first="b"))
    path = save(tmp_path / "b_64.pth", model)  # nothing known: only the size can be wrong
    load_model(path, tokenizer=SmallTokenizer(V - 5))
    with pytest.raises(ValueError, match=r"102 tokens.*b_64.pth only 97.*--tokenizer_path"):
        load_model(path, tokenizer=SmallTokenizer(V + 5))


# --- files of MiniMind, without a sidecar -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lm_head", [True, False])
def test_configuration_is_detected(kind, lm_head, tmp_path):
    model, told = tiny(kind), []
    state = model.state_dict()
    if not lm_head:
        del state["lm_head.weight"]
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "full_sft_64.pth")
    loaded = load_model(tmp_path / "full_sft_64.pth", say=told.append)
    expected = config_dict(model.config)
    if kind == "v3-moe":  # what no shape shows, and v3's own files have as the rest of the widths
        expected["intermediate_size"] = expected["moe_intermediate_size"]
    assert config_dict(loaded.config) == expected
    assert_near(loaded, model)
    (message,) = told
    assert "full_sft_64.pth" in message and f"MiniMind {kind[:2]} weights" in message
    assert "--tokenizer_path" in message and "2 layers" in message and "rope_theta 1000000.0" in message
    assert ("mixture" in message) == ("moe" in kind) and ("num_attention_heads 8" in message) == ("v2" in kind)


def assert_near(loaded, model):
    assert (loaded(IDS).logits - model(IDS).logits).abs().max() < 0.01


def test_untied_and_gated_weights_are_detected(tmp_path):
    model = tiny(tie_word_embeddings=False, mlp_gate=True)
    config = detect_config(model.state_dict(), say=str)
    assert not config.tie_word_embeddings and config.mlp_gate
    load_state(MiniMindForCausalLM(config), model.state_dict(), "a")


def test_what_shapes_cannot_show_can_be_stated():
    told = []
    overrides = {"num_attention_heads": 4, "rope_theta": 1e4, "rms_norm_eps": 1e-3}
    config = detect_config(tiny(num_attention_heads=4).state_dict(), "a", overrides, told.append)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert (config.rope_theta, config.rms_norm_eps) == (1e4, 1e-3)
    assert "num_attention_heads 4" in told[0] and "rope_theta 10000.0" in told[0]
    state = tiny("v2-moe").state_dict()
    one = detect_config(state, "a", {"num_experts_per_tok": 1}, str)
    assert one.num_experts_per_tok == 1 and not one.norm_topk_prob
    two = detect_config(state, "a", None, str)
    assert two.num_experts_per_tok == 2 and two.norm_topk_prob and two.seq_aux
    v3 = detect_config(tiny("v3-moe").state_dict(), "a", {"aux_loss_alpha": 0.5, "num_experts_per_tok": 3}, str)
    assert (v3.aux_loss_alpha, v3.num_experts_per_tok, v3.norm_topk_prob, v3.seq_aux) == (0.5, 3, True, False)


def test_foreign_state_dicts_are_refused_by_name():
    with pytest.raises(ValueError, match="other.pth has no model.embed_tokens.weight.*transformer.wte"):
        detect_config({"transformer.wte.weight": torch.zeros(3, 3)}, "other.pth", say=fail)
    with pytest.raises(ValueError, match="has no model.layers.0.self_attn.q_proj.weight"):
        detect_config({"model.embed_tokens.weight": torch.zeros(3, 3)}, say=fail)
    state = {name: t for name, t in tiny().state_dict().items() if "mlp" not in name}
    with pytest.raises(ValueError, match="model.layers.0.mlp.gate_proj.weight"):
        detect_config(state, say=fail)


def test_preset_flags_fit_files_of_that_preset():
    """`--preset` states many fields, some of which shapes show: they must not count as contradictions."""
    with torch.device("meta"):
        from model.presets import PRESETS

        for name, sizes in PRESETS.items():
            state = MiniMindForCausalLM(MiniMindConfig(**sizes)).state_dict()
            state = {key: torch.empty_strided(t.shape, t.stride(), device="meta") for key, t in state.items()}
            del state["lm_head.weight"]
            state = {key: t if "embed" not in key else torch.zeros(t.shape, device="cpu") for key, t in state.items()}
            config = detect_config(
                state, name, {**sizes, "num_attention_heads": sizes.get("num_attention_heads", 8)}, str
            )
            assert config_dict(config) == config_dict(MiniMindConfig(**sizes)), name
