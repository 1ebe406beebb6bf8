"""Reading and writing weights: `pytest tests/test_checkpoint.py`. The published formats are tried on the tiny models of
fixtures/minimind_weights, one folder with weights and expected logits per generation."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from dataset.tokenizer import load_tokenizer
from model import checkpoint
from model.adapters import adapter_path
from model.checkpoint import CheckpointError
from model.export.huggingface import save_hf
from model.formats import hf_config, hf_state_dict
from model.model import MiniMindConfig, MiniMindLM
from trainer.speed import compile_blocks

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures" / "minimind_weights"
TOKENIZER = load_tokenizer()
IDS = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(1))
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
EXPORTABLE = {
    "llama": {},
    "llama-yarn": dict(rope_scaling=YARN),
    "qwen3": dict(qk_norm=True, head_dim=24),
    "qwen3_moe": dict(qk_norm=True, num_experts=4, num_experts_per_tok=2, norm_topk_prob=False, rope_theta=5e5),
}


def same_weights(a: MiniMindLM, b: MiniMindLM) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(x, b[name]) for name, x in a.items())


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def message(call, *args) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ our own file


@pytest.mark.parametrize(
    "changes", [*EXPORTABLE.values(), dict(num_experts=4, num_shared_experts=1)], ids=[*EXPORTABLE, "shared_experts"]
)
def test_save_and_load_give_back_every_bit(tiny, tmp_path, changes):
    model, meta = tiny(**changes), {"step": 3, "losses": [1.5, None], "args": {"name": "x"}}
    path = tmp_path / "a" / "b.pth"
    checkpoint.save(path, model, meta)
    state = torch.get_rng_state()
    loaded, loaded_meta = checkpoint.load(path)
    assert torch.equal(torch.get_rng_state(), state)  # loading draws no random numbers
    assert same_weights(loaded, model) and loaded.config == model.config and not loaded.training
    assert loaded_meta == checkpoint.load_meta(path) == meta
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())
    assert torch.equal(logits(loaded), logits(model))
    assert [p.name for p in path.parent.iterdir()] == ["b.pth"]
    assert "lm_head.weight" not in torch.load(path, weights_only=True)["model"]  # the tied weight is there once


def test_bf16_on_request(tiny, tmp_path):
    model = tiny()
    checkpoint.save(tmp_path / "a.pth", model, dtype=torch.bfloat16)
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    assert all(w.dtype == torch.bfloat16 for w in content["model"].values())
    loaded, meta = checkpoint.load(tmp_path / "a.pth")
    assert meta == {} and all(p.dtype == torch.float32 for p in loaded.parameters())
    assert same_weights(loaded, model.bfloat16().float())


def test_compilation_leaves_no_trace_in_the_names(tiny, tmp_path):
    model = tiny()
    compile_blocks(model)
    model.model.layers[1] = torch.compile(model.model.layers[1])
    checkpoint.save(tmp_path / "a.pth", model)
    assert same_weights(checkpoint.load(tmp_path / "a.pth")[0], tiny())


@pytest.mark.parametrize("value", [Path("x"), object(), {1, 2}])
def test_what_could_not_be_read_back_is_not_written(tiny, tmp_path, value):
    with pytest.raises(TypeError, match=r"meta\['args'\]\['data_path'\]"):
        checkpoint.save(tmp_path / "a.pth", tiny(), {"args": {"data_path": value}})
    assert not list(tmp_path.iterdir())


def test_a_configuration_of_another_version_is_refused(tiny, tmp_path):
    checkpoint.save(tmp_path / "a.pth", tiny())
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    torch.save(content | {"config": content["config"] | {"flux": 1}}, tmp_path / "b.pth")
    assert "flux" in message(checkpoint.load, tmp_path / "b.pth")
    torch.save(content | {"config": content["config"] | {"intermediate_size": 128}}, tmp_path / "c.pth")
    assert "gate_proj.weight" in message(checkpoint.load, tmp_path / "c.pth")
    del content["model"]["model.norm.weight"]
    torch.save(content, tmp_path / "d.pth")
    assert "model.norm.weight" in message(checkpoint.load, tmp_path / "d.pth")


# ------------------------------------------------------------------------------------------------ published weights


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("name", ["v2a-dense", "v2a-moe", "v2b-dense", "v2b-moe", "v3-dense", "v3-moe"])
def test_published_weights_give_their_own_logits(name, with_config, tmp_path):
    path = FIXTURES / name / "weights.pth"
    if not with_config:
        path = shutil.copy(path, tmp_path / "weights.pth")
    model, meta = checkpoint.load(path)
    expected = torch.load(FIXTURES / name / "expected.pt", weights_only=True)
    assert meta == {} and (logits(model, expected["input_ids"]) - expected["logits"]).abs().max() < 1e-3
    checkpoint.save(tmp_path / "ours.pth", model)
    assert same_weights(checkpoint.load(tmp_path / "ours.pth")[0], model)


def old_names(model: MiniMindLM, prefix: str = "") -> dict:
    weights = {prefix + name: w.clone() for name, w in model.state_dict().items()}
    return weights | {prefix + "lm_head.weight": model.model.embed_tokens.weight.detach().clone()}


def test_bare_weights_of_another_head_count(tiny, tmp_path):
    """Only config.json can tell the number of heads; with QK-norm the shapes do."""
    model = tiny(rms_norm_eps=1e-5)
    torch.save(old_names(model, "module."), tmp_path / "w.pth")
    assert checkpoint.load(tmp_path / "w.pth")[0].config.num_attention_heads == 8
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(checkpoint.load(tmp_path / "w.pth")[0]), logits(model))
    normed = tiny(qk_norm=True)
    (tmp_path / "b").mkdir()
    torch.save(old_names(normed), tmp_path / "b" / "w.pth")
    assert torch.equal(logits(checkpoint.load(tmp_path / "b" / "w.pth")[0]), logits(normed))


def test_a_config_json_of_another_model_is_not_used(tiny, tmp_path, capsys):
    torch.save(old_names(tiny(qk_norm=True)), tmp_path / "w.pth")
    (tmp_path / "config.json").write_text('{"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 16}')
    assert checkpoint.load(tmp_path / "w.pth")[0].config.num_attention_heads == 4
    assert "config.json" in capsys.readouterr().err


def test_an_output_layer_of_its_own_is_refused(tiny, tmp_path):
    weights = old_names(tiny(qk_norm=True))
    weights["lm_head.weight"] += 1
    torch.save(weights, tmp_path / "w.pth")
    assert "w.pth" in message(checkpoint.load, tmp_path / "w.pth")


# ------------------------------------------------------------------------------------------------ Hugging Face folders


@pytest.mark.parametrize("name", EXPORTABLE)
def test_exported_folder_works_in_transformers_and_comes_back(tiny, tmp_path, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny(vocab_size=6400, **EXPORTABLE[name])
    save_hf(tmp_path / "hf", model, TOKENIZER, dtype=torch.float32)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert (theirs.eval()(IDS).logits - logits(model)).abs().max() < 1e-4
    assert theirs.generation_config.eos_token_id == 2 and theirs.generation_config.pad_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>user\nhi<|im_end|>")
    back, meta = checkpoint.load(tmp_path / "hf")
    assert same_weights(back, model) and meta == {}
    assert torch.equal(logits(back), logits(model))

    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")  # as transformers itself writes it
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    back, _ = checkpoint.load(tmp_path / "sharded")
    assert same_weights(back, model) and torch.equal(logits(back), logits(model))
    next((tmp_path / "sharded").glob("model-00002*")).unlink()
    assert "model-00002" in message(checkpoint.load, tmp_path / "sharded")


def test_export_is_bf16_unless_told_otherwise(tiny, tmp_path):
    from safetensors.torch import load_file

    save_hf(tmp_path, tiny(), TOKENIZER)
    assert {w.dtype for w in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("changes", [dict(num_shared_experts=1, qk_norm=True), dict(qk_norm=False)])
def test_what_has_no_counterpart_is_not_exported(tiny, tmp_path, changes):
    model = tiny(num_experts=4, **changes)
    message(hf_config, model.config)
    message(save_hf, tmp_path, model, TOKENIZER)
    message(hf_state_dict, model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None, "model_type": "mistral"}, "mistral"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ({"tie_word_embeddings": False}, "tie"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight"),
        ({"num_attention_heads": 3, "head_dim": None}, "hidden_size 64"),
    ],
)
def test_other_architectures_are_refused_in_one_sentence(tiny, tmp_path, changes, words):
    save_hf(tmp_path, tiny(), TOKENIZER)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    text = message(checkpoint.load, tmp_path)
    assert words in text and str(tmp_path) in text


def test_an_untied_flag_with_an_equal_output_layer_is_fine(tiny, tmp_path):
    from safetensors.torch import save_file

    model = tiny()
    save_hf(tmp_path, model, TOKENIZER)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(old_names(model), tmp_path / "model.safetensors")
    assert same_weights(checkpoint.load(tmp_path)[0], model)
    save_file(old_names(model) | {"lm_head.weight": torch.zeros(320, 64)}, tmp_path / "model.safetensors")
    assert str(tmp_path) in message(checkpoint.load, tmp_path)


# ------------------------------------------------------------------------------------------------ bad files


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_file_that_would_run_code_is_refused(tmp_path, new_format):
    trace = tmp_path / "was_run"
    torch.save({"model": Evil(trace)}, tmp_path / "evil.pth", _use_new_zipfile_serialization=new_format)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil(trace), protocol=2))
    for name in ("evil.pth", "plain.pth"):
        assert name in message(checkpoint.load, tmp_path / name)
        assert name in message(checkpoint.load_meta, tmp_path / name)
    assert not trace.exists()


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tiny, tmp_path, keep):
    checkpoint.save(tmp_path / "a.pth", tiny())
    content = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(content[: int(keep * len(content))])
    assert "a.pth" in message(checkpoint.load, tmp_path / "a.pth")
    assert "a.pth" in message(checkpoint.load_meta, tmp_path / "a.pth")


def test_foreign_files_are_named_for_what_they_are(tiny, tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    assert "weight, bias" in message(checkpoint.load, tmp_path / "linear.pth")
    torch.save({"epoch": 1, "state_dict": {}}, tmp_path / "dict.pth")
    assert "epoch, state_dict" in message(checkpoint.load, tmp_path / "dict.pth")
    torch.save(torch.ones(2), tmp_path / "tensor.pth")
    assert "Tensor" in message(checkpoint.load, tmp_path / "tensor.pth")
    (tmp_path / "text.pth").write_text("hello\nworld\n" * 100)
    assert "text" in message(checkpoint.load, tmp_path / "text.pth")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("a.txt", "a")
    assert "zip" in message(checkpoint.load, tmp_path / "zip.pth")
    (tmp_path / "noise.pth").write_bytes(random.Random(0).randbytes(5000))
    assert "noise.pth" in message(checkpoint.load, tmp_path / "noise.pth")
    save_hf(tmp_path / "hf", tiny(), TOKENIZER)
    assert "folder" in message(checkpoint.load, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"\0" * 100)
    assert "model.safetensors" in message(checkpoint.load, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert "model.safetensors" in message(checkpoint.load, tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text("{")
    assert "JSON" in message(checkpoint.load, tmp_path / "hf")
    assert "linear.pth" in message(checkpoint.load, tmp_path)  # a folder, but not Hugging Face's


def test_a_missing_path_lists_what_is_there(tiny, tmp_path):
    checkpoint.save(tmp_path / "out" / "pretrain_64.pth", tiny())
    assert "pretrain_64.pth" in message(checkpoint.load, tmp_path / "out" / "pretrain_65.pth")
    assert "outt" in message(checkpoint.load, tmp_path / "outt" / "pretrain_64.pth")


def test_weights_are_found_by_stage(tiny, tmp_path, capsys):
    dense, moe = tiny(), tiny(num_experts=4)
    for model in (dense, moe):
        checkpoint.save(checkpoint.checkpoint_path(tmp_path, "pretrain", model.config), model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pretrain_64.pth", "pretrain_64_moe.pth"]
    assert adapter_path(tmp_path, "x", moe.config) == tmp_path / "lora" / "x_64_moe.pth"
    assert checkpoint.find_weights(tmp_path, "pretrain", use_moe=False).name == "pretrain_64.pth"
    assert checkpoint.find_weights(tmp_path, "pretrain", 64, use_moe=True).name == "pretrain_64_moe.pth"
    path = str(tmp_path / "pretrain_64_moe.pth")
    assert checkpoint.find_weights("elsewhere", path) == Path(path)
    assert "pretrain_64.pth" in message(checkpoint.find_weights, tmp_path, "pretrain", 512)
    assert "does not exist" in message(checkpoint.find_weights, tmp_path, str(tmp_path / "a.pth"))
    shutil.copy(tmp_path / "pretrain_64.pth", tmp_path / "pretrain_512.pth")
    os.utime(tmp_path / "pretrain_64.pth", (0, 0))
    os.utime(tmp_path / "pretrain_512.pth", (1, 1))
    capsys.readouterr()
    assert checkpoint.find_weights(tmp_path, ("rlhf", "pretrain"), use_moe=False).name == "pretrain_512.pth"
    (note,) = capsys.readouterr().err.splitlines()
    assert all(name in note for name in ("pretrain_512.pth", "pretrain_64.pth")) and "_moe" not in note
    assert checkpoint.find_weights(tmp_path, "pretrain").name == "pretrain_64_moe.pth"
    assert checkpoint.find_weights(tmp_path, "pretrain", 512).name == "pretrain_512.pth"


# ------------------------------------------------------------------------------------------------ resume state


def make_state(step: int) -> dict:
    torch.manual_seed(step)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    rng = {"cpu": torch.get_rng_state()}
    return {"model": model.state_dict(), "optimizers": [optimizer.state_dict()], "rng": [rng], "step": step}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_resume_state_round_trip(tmp_path):
    folder = tmp_path / "run_resume"
    assert checkpoint.load_resume(folder) is None
    checkpoint.save_resume(folder, make_state(7), 7)
    state, expected = checkpoint.load_resume(folder), make_state(7)
    assert state["step"] == 7 and torch.equal(state["rng"][0]["cpu"], expected["rng"][0]["cpu"])
    assert torch.equal(state["model"]["weight"], expected["model"]["weight"])
    moments = [s["optimizers"][0]["state"][0]["exp_avg"] for s in (state, expected)]
    assert torch.equal(*moments)
    assert state["optimizers"][0]["param_groups"] == expected["optimizers"][0]["param_groups"]
    checkpoint.remove_resume(folder)
    assert not folder.exists()
    checkpoint.remove_resume(folder)


def test_old_states_and_stale_temporary_files_go(tmp_path):
    (tmp_path / ".state_00000001.pt.123.tmp").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("mine")
    for step in (1, 2, 3, 10):
        checkpoint.save_resume(tmp_path, make_state(step), step, keep=2)
    assert names(tmp_path) == ["notes.txt", "state_00000003.pt", "state_00000010.pt"]
    checkpoint.save_resume(tmp_path, make_state(5), 5, keep=2)  # of a run that went back: step 10 is not its future
    assert names(tmp_path) == ["notes.txt", "state_00000003.pt", "state_00000005.pt"]
    checkpoint.remove_resume(tmp_path)
    assert names(tmp_path) == ["notes.txt"]


def test_a_damaged_newest_state_is_passed_over_and_said(tmp_path, capsys):
    for step in (1, 2):
        checkpoint.save_resume(tmp_path, make_state(step), step, keep=2)
    newest = tmp_path / "state_00000002.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert checkpoint.load_resume(tmp_path)["step"] == 1
    err = capsys.readouterr().err
    assert "state_00000002.pt is cut off" in err and err.count("\n") == 1
    (tmp_path / "state_00000001.pt").write_bytes(b"")
    assert str(tmp_path) in message(checkpoint.load_resume, tmp_path)


SAVE_IN_A_LOOP = """
import os, sys, torch
from pathlib import Path
from model import checkpoint
from model.model import MiniMindConfig, MiniMindLM

torch.set_num_threads(1)
folder = Path(sys.argv[1])
model = MiniMindLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, vocab_size=320))
for line in sys.stdin:  # fork a saver for each line, so that torch is imported once only
    step, saver = int(line), os.fork()
    if saver:
        print("pid", saver, flush=True)
        os.wait()
        print("dead 0", flush=True)
    while not saver:
        step += 1
        weights = {"a": torch.full((100_000,), float(step)), "b": torch.full((50_000,), float(step))}
        checkpoint.save_resume(folder, {"step": step, "weights": weights}, step)
        checkpoint.save(folder / "weights.pth", model, {"step": step})
        print("saved", step, flush=True)
"""


@pytest.mark.slow
def test_kill_at_any_moment_leaves_a_complete_newest_state(tmp_path, capsys):
    """kill -9 of a process that does nothing but save: what it last reported as saved, or something newer, can be read
    afterwards, without a complaint."""
    rng, step, in_the_middle = random.Random(0), 0, 0
    command = [sys.executable, "-c", SAVE_IN_A_LOOP, str(tmp_path)]
    launcher = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for _ in range(20):
        launcher.stdin.write(f"{step}\n")
        launcher.stdin.flush()
        said = {"saved": 0}
        while "pid" not in said or not said["saved"]:
            word, number = launcher.stdout.readline().split()
            said[word] = int(number)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(said["pid"], signal.SIGKILL)
        while "dead" not in said:
            word, number = launcher.stdout.readline().split()
            said[word] = int(number)
        in_the_middle += bool(list(tmp_path.glob(".*.tmp")))
        state = checkpoint.load_resume(tmp_path)
        assert state["step"] >= said["saved"] > step
        step = state["step"]
        assert all((w == step).all() for w in state["weights"].values())
        assert checkpoint.load(tmp_path / "weights.pth")[1]["step"] in (step - 1, step)
    launcher.stdin.close()
    assert launcher.wait() == 0 and capsys.readouterr().err == ""
    assert in_the_middle > 0  # at least one kill hit a file half written
    checkpoint.save_resume(tmp_path, {"step": step + 1}, step + 1)
    model = MiniMindLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, vocab_size=320))
    checkpoint.save(tmp_path / "weights.pth", model)
    assert names(tmp_path) == [f"state_{step + 1:08d}.pt", "weights.pth"]


FULL_DISK = """
import resource, sys, torch
from model import checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    checkpoint.save_resume(sys.argv[1], {"step": 2, "w": torch.zeros(200_000)}, 2)
except checkpoint.CheckpointError as error:
    print(error)
"""


@pytest.mark.posix
def test_a_full_disk_is_one_line_and_costs_nothing(tmp_path):
    checkpoint.save_resume(tmp_path, {"step": 1}, 1)
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.count("\n") == 1
    assert str(tmp_path / "state_00000002.pt") in done.stdout
    assert names(tmp_path) == ["state_00000001.pt"]
    assert checkpoint.load_resume(tmp_path) == {"step": 1}


def test_a_folder_that_cannot_be_written_is_one_line(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in message(checkpoint.save, tmp_path / "file" / "a.pth", tiny())
