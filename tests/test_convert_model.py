"""scripts/convert_model.py and what other libraries make of its results: `pytest tests/test_convert_model.py`."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import _parity
import pytest
import torch

import cli
from dataset.chat import TOKENIZER_DIR, load_tokenizer
from model import adapters, checkpoint
from model.checkpoint import CheckpointError
from model.export import gguf as gguf_file
from model.export.huggingface import save_hf
from model.export.llama_cpp import LlamaCpp
from model.model import LoRAConfig, add_lora
from train_tokenizer import IDENTITY

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ROOT / "tests" / "fixtures" / "real_text" / "texts.jsonl"
SPEC = importlib.util.spec_from_file_location("convert_model", ROOT / "scripts" / "convert_model.py")
convert_model = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(convert_model)
KINDS = {"llama": {}, "qwen3": dict(qk_norm=True), "qwen3_moe": dict(qk_norm=True, num_experts=4)}
CALL = {"type": "function", "id": "x", "function": {"name": "f", "arguments": '{"a": [1, 2], "b": "x, y"}'}}
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "\n 2+2? 你"},
    {"role": "assistant", "content": "\n\n a", "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "x"},
    {"role": "assistant", "content": "4", "reasoning_content": "because\n"},
    {"role": "user", "content": "thanks"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}]


@pytest.fixture
def convert(monkeypatch):
    def call(*args, main=convert_model.main):
        monkeypatch.setattr(sys, "argv", ["convert_model.py", *map(str, args)])
        main()

    return call


@pytest.fixture
def saved(tiny, tmp_path):
    def save(**changes):
        model = tiny(**dict(vocab_size=6400, hidden_size=128, intermediate_size=128, initializer_range=0.1) | changes)
        checkpoint.save(tmp_path / "a.pth", model, {"stage": "full_sft", "val_loss": 1.25})
        return model

    return save


@pytest.mark.parametrize("kind", KINDS)
def test_folder_and_back_bit_for_bit(saved, convert, tmp_path, capsys, kind):
    model = saved(**KINDS[kind])
    convert(tmp_path / "a.pth", tmp_path / "hf", "--dtype", "fp32")
    convert(tmp_path / "hf", tmp_path / "b.pth")
    assert capsys.readouterr().out.count("parity holds") == 2
    back = checkpoint.load(tmp_path / "b.pth")[0].state_dict()
    assert all(torch.equal(w, back[name]) for name, w in model.state_dict().items())
    assert "1.2500 nats" in (tmp_path / "hf" / "README.md").read_text()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["fp32", "q8_0"])
def test_llama_cpp_computes_the_same(saved, convert, tmp_path, capsys, kind, dtype):
    pytest.importorskip("xllamacpp")
    saved(**KINDS[kind])
    convert(tmp_path / "a.pth", tmp_path / "a.gguf", "--dtype", dtype)
    assert "llama.cpp" in capsys.readouterr().out
    assert "FROM ./a.gguf" in (tmp_path / "a.Modelfile").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_goes_beyond_the_original_context_with_yarn(saved, tmp_path, kind):
    """The same greedy tokens at twice the original length, and other ones without YaRN."""
    pytest.importorskip("xllamacpp")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    model = saved(**KINDS[kind], rope_scaling=yarn, max_position_embeddings=256)
    prompts = torch.randint(10, 6400, (2, 120), generator=torch.Generator().manual_seed(0)).tolist()
    gguf_file.save_gguf(tmp_path / "a.gguf", model, load_tokenizer(), "f32")
    with LlamaCpp(tmp_path / "a.gguf", context=256) as engine:
        _parity.with_llama_cpp(model, engine, prompts).require(1e-2)
        model.config.rope_scaling = None
        model.set_rope()
        with pytest.raises(CheckpointError, match="llama.cpp"):
            _parity.with_llama_cpp(model, engine, prompts).require(1e-2)


@pytest.mark.parametrize("beta", ["beta_fast", "beta_slow"])
def test_yarn_that_llama_cpp_would_not_follow_is_refused(saved, tmp_path, beta):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, beta: 2.0}
    with pytest.raises(CheckpointError, match="beta_slow"):
        gguf_file.save_gguf(tmp_path / "a.gguf", saved(rope_scaling=yarn), load_tokenizer(), "f32")
    assert not (tmp_path / "a.gguf").exists()


def test_llama_cpp_splits_and_renders_the_same(saved, tmp_path):
    pytest.importorskip("xllamacpp")
    from transformers import AutoTokenizer

    gguf_file.save_gguf(tmp_path / "a.gguf", saved(), load_tokenizer(), "f16")
    ours, theirs = load_tokenizer(), AutoTokenizer.from_pretrained(TOKENIZER_DIR)
    with LlamaCpp(tmp_path / "a.gguf") as engine:
        for n in (2, len(CHAT)):
            for tools in (None, TOOLS):
                for thinking in (True, False):  # llama.cpp always says which of the two
                    options = {"tools": tools} if tools else {}
                    rendered = engine.render(CHAT[:n], chat_template_kwargs={"enable_thinking": thinking}, **options)
                    expected = theirs.apply_chat_template(
                        CHAT[:n], tokenize=False, add_generation_prompt=True, enable_thinking=thinking, **options
                    )
                    assert rendered == expected
        texts = [json.loads(line)["text"] for line in TEXTS.open(encoding="utf-8")]
        for text in [*texts, *IDENTITY.values()]:
            if "\0" not in text and "<|" not in text:  # a NUL ends a text there, and markers in it are control tokens
                assert engine.tokenize(text) == ours.encode(text).ids


@pytest.mark.parametrize("thinks", [True, False])
def test_llama_cpp_opens_a_thought_only_for_models_that_think(saved, tmp_path, thinks):
    pytest.importorskip("xllamacpp")
    gguf_file.save_gguf(tmp_path / "a.gguf", saved(), load_tokenizer(), "f16", thinks=thinks)
    with LlamaCpp(tmp_path / "a.gguf") as engine:
        assert engine.render(CHAT[:2]).endswith("<|im_start|>assistant\n" + "<think>\n" * thinks)


@pytest.mark.parametrize("stage, thinks", [("full_sft", False), ("reason", True)])
def test_the_modelfile_has_what_ollama_looks_for(saved, convert, tmp_path, stage, thinks):
    """Thinking, which Ollama switches on wherever the template has it, only where it was trained; the marks of thoughts
    and calls as text at the head of their blocks, where Ollama reads them off."""
    checkpoint.save(tmp_path / "a.pth", saved(), {"stage": stage})
    convert(tmp_path / "a.pth", tmp_path / "a.gguf", "--dtype", "fp32")
    text = (tmp_path / "a.Modelfile").read_text(encoding="utf-8")
    assert ("{{ if .Thinking }}<think>\n{{ .Thinking }}\n</think>\n\n{{ end }}" in text) == thinks
    assert (".Thinking" in text) == ("Think }}" in text) == thinks
    assert text.index(".ToolCalls }}<tool_call>\n") == text.index(" .ToolCalls") + 1


def test_what_does_not_agree_is_not_left_behind(saved, convert, tmp_path, monkeypatch):
    saved()
    monkeypatch.setattr(gguf_file, "pair_rotation", lambda w, head_dim: w)  # the trap: llama's rows as they are
    monkeypatch.setattr(gguf_file, "half_rotation", lambda w, head_dim: w)
    pytest.importorskip("xllamacpp")
    with pytest.raises(CheckpointError, match="llama.cpp"):
        convert(tmp_path / "a.pth", tmp_path / "a.gguf", "--dtype", "fp32")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_adapter_merged_and_to_peft_and_back(saved, convert, tmp_path):
    model = saved(qk_norm=True)
    add_lora(model, "x", LoRAConfig(rank=4))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B_" in name:
                p.normal_(0, 0.05)
    adapters.save_adapter(tmp_path / "x.pth", model, "x")
    convert(tmp_path / "a.pth", tmp_path / "peft", "--to", "peft", "--lora", tmp_path / "x.pth")
    convert(tmp_path / "a.pth", tmp_path / "y.pth", "--to", "lora", "--lora", tmp_path / "peft")
    convert(tmp_path / "a.pth", tmp_path / "merged.pth", "--lora", tmp_path / "y.pth")
    first, second = (torch.load(tmp_path / n, weights_only=True)["model"] for n in ("x.pth", "y.pth"))
    assert all(torch.equal(w, second[name]) for name, w in first.items())


@pytest.mark.parametrize("changes", [dict(num_shared_experts=1), dict(norm_topk_prob=False)])
def test_a_moe_that_llama_cpp_does_not_have_is_refused(saved, convert, tmp_path, changes):
    saved(qk_norm=True, num_experts=4, **changes)
    with pytest.raises(CheckpointError):
        convert(tmp_path / "a.pth", tmp_path / "a.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_a_bin_or_an_adapter_is_refused(saved, tiny, tmp_path):
    model, trace = saved(), tmp_path / "was_run"
    save_hf(tmp_path / "hf", model, load_tokenizer())
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil(trace)}, tmp_path / "hf" / "pytorch_model.bin")
    torch.save({"lora": Evil(trace)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="pytorch_model.bin|x.pth"):
        checkpoint.load(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="pytorch_model.bin|x.pth"):
        adapters.load_adapter(tmp_path / "x.pth", model, "x")
    assert not trace.exists()


COMPARES = {"hf": "transformers", "gguf": "xllamacpp", "peft": "peft"}


def adapter_of(model, tmp_path) -> Path:
    add_lora(model, "x", LoRAConfig(rank=4))
    adapters.save_adapter(tmp_path / "x.pth", model, "x")
    return tmp_path / "x.pth"


def test_a_format_whose_package_is_missing_is_one_line(saved, convert, tmp_path, monkeypatch, capsys):
    saved()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit) as stopped:
        convert(tmp_path / "a.pth", tmp_path / "result", "--to", "gguf", main=lambda: cli.run(convert_model.main))
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and "pip install gguf\n" in error and error.count("\n") == 1
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize("to", COMPARES)
def test_without_the_library_to_compare_with_it_says_so(saved, convert, tmp_path, monkeypatch, capsys, to):
    model = saved()
    lora = ["--lora", adapter_of(model, tmp_path)] if to == "peft" else []
    monkeypatch.setitem(sys.modules, COMPARES[to], None)
    convert(tmp_path / "a.pth", tmp_path / "result", "--to", to, *lora)
    out, error = capsys.readouterr()
    assert f"pip install {COMPARES[to]}\n" in error and "not compared" in error
    assert (tmp_path / "result").exists() and "parity holds" not in out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"wte.weight": torch.ones(2, 2), "h.0.ln_1.weight": torch.ones(2)}, "wte.weight"),
        ({"cls_token": torch.ones(2), "patch_embed.proj.weight": torch.ones(2)}, "cls_token"),
        ({"state": {}, "param_groups": []}, "param_groups"),
        ({1: 2, 3: 4}, "1, 3"),
        ([torch.ones(2)], "list"),
    ],
)
def test_other_files_are_refused_in_a_line(convert, tmp_path, content, words):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=words):
        convert(tmp_path / "w.pth", tmp_path / "hf")


@pytest.mark.parametrize(
    "changes",
    [
        dict(hidden_size=128, num_hidden_layers=3, num_key_value_heads=1),
        dict(num_key_value_heads=8, num_experts=6, num_shared_experts=3),
        dict(hidden_size=96, num_key_value_heads=4, num_experts=3, num_shared_experts=1),
        dict(num_attention_heads=6, head_dim=32, qk_norm=True, num_experts=5, num_experts_per_tok=1),
    ],
)
def test_bare_weights_of_other_shapes_are_recognised(tiny, convert, tmp_path, changes):
    model = tiny(**dict(num_attention_heads=8, rms_norm_eps=1e-6 if "qk_norm" in changes else 1e-5) | changes)
    head = {"lm_head.weight": model.model.embed_tokens.weight.detach().clone()}
    torch.save(dict(model.state_dict()) | head, tmp_path / "w.pth")
    convert(tmp_path / "w.pth", tmp_path / "ours.pth")
    back = checkpoint.load(tmp_path / "ours.pth")[0]
    assert torch.equal(back(torch.arange(12)[None]).logits, model(torch.arange(12)[None]).logits)
