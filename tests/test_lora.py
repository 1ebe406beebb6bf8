"""LoRA against peft on the same weights, and what must not change: the base, the names, the bits after unmerging."""

import copy
import re

import pytest
import torch
from torch import nn

from dataset.tokenizer import load_tokenizer
from model import checkpoint, files
from model.adapters import fingerprint, load_adapter, save_adapter
from model.checkpoint import CheckpointError
from model.export.huggingface import save_hf
from model.export.peft import load_peft, save_peft
from model.model import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    base_state_dict,
    lora_layers,
    merge_lora,
    set_adapter,
    unmerge_lora,
)
from tests.helpers import next_token_loss
from trainer.optimizer import build_optimizers
from trainer.speed import compile_blocks, install

TOKENIZER = load_tokenizer()
KINDS = {
    "llama": {},
    "qwen3": {"qk_norm": True},
    "moe": {"qk_norm": True, "num_experts": 4, "num_shared_experts": 1},
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def with_adapter(model, name="a", seed=1, **config):
    """The model with a trained-looking adapter: B is not zero."""
    torch.manual_seed(seed)
    add_lora(model, name, LoRAConfig(**config))
    with torch.no_grad():
        for layer in lora_layers(model).values():
            if name in layer.configs:
                layer.matrices(name)[1].normal_(std=0.1)
    return model


def tokens(batch=2, length=12, seed=3):
    return torch.randint(0, 320, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids=None):
    with torch.no_grad():
        return model(tokens() if ids is None else ids).logits


# ------------------------------------------------------------------------------------------------ peft


def peft_matrices(model, name):
    layer = model.get_submodule(name)
    return layer.lora_A["a"].weight, layer.lora_B["a"].weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_outputs_and_gradients_are_pefts(tiny, kind, dropout):
    """peft around a copy of the same model, in training mode: the same seed drops the same inputs."""
    from peft import LoraConfig, inject_adapter_in_model

    ours = tiny(**KINDS[kind])
    theirs = copy.deepcopy(ours)
    config = LoRAConfig(rank=4, alpha=6, dropout=dropout)
    with_adapter(ours, rank=4, alpha=6, dropout=dropout)
    settings = {"r": 4, "lora_alpha": 6, "lora_dropout": dropout, "target_modules": list(config.targets)}
    theirs = inject_adapter_in_model(LoraConfig(**settings), theirs, adapter_name="a").eval()
    layers = lora_layers(ours)
    assert {name for name, m in theirs.named_modules() if hasattr(m, "base_layer")} == set(layers)
    assert any(layer.in_features < layer.out_features for layer in layers.values())
    assert any(layer.in_features > layer.out_features for layer in layers.values())
    with torch.no_grad():
        for name, layer in layers.items():
            for mine, its in zip(layer.matrices("a"), peft_matrices(theirs, name), strict=True):
                its.copy_(mine)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)

    losses = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(5)
        losses.append(next_token_loss(model, tokens(), tokens(seed=4)) - model(tokens()).aux_loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for name, layer in layers.items():
        for mine, its in zip(layer.matrices("a"), peft_matrices(theirs, name), strict=True):
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "moe"])
def test_peft_folder_both_ways(tiny, tmp_path, kind):
    """Our adapter on the exported base in transformers and peft; then one that peft made, here."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    model = tiny(**KINDS[kind] | {"num_shared_experts": 0})
    base = copy.deepcopy(model)
    save_hf(tmp_path / "base", model, TOKENIZER, torch.float32)
    with_adapter(model, rank=4, alpha=8, dropout=0.1)
    save_peft(tmp_path / "ours", model, "a", str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "ours")
    torch.testing.assert_close(theirs.eval()(tokens()).logits, logits(model), rtol=1e-4, atol=1e-4)
    again = copy.deepcopy(base)
    load_peft(tmp_path / "ours", again, "b")
    assert torch.equal(logits(again), logits(model))
    assert again.model.layers[0].self_attn.q_proj.configs["b"] == LoRAConfig(
        4, 8, 0.0 if kind == "moe" else 0.1, tuple(sorted(LoRAConfig().targets))
    )

    # Two layers' attention, one layer's feed-forward: targets that last names alone do not tell.
    names = r".*self_attn\.[qo]_proj" + (r"|.*layers\.1\.mlp\.down_proj" if kind != "moe" else "")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    made = get_peft_model(fresh, LoraConfig(r=3, lora_alpha=5, target_modules=names, init_lora_weights=False))
    made.save_pretrained(tmp_path / "theirs")
    load_peft(tmp_path / "theirs", base, "c")
    assert len(lora_layers(base)) == (4 if kind == "moe" else 5)
    torch.testing.assert_close(logits(base), made.eval()(tokens()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, part",
    [
        ({"use_dora": True}, "use_dora True"),
        ({"use_rslora": True}, "use_rslora True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 5}, "lora_A is [4, 96], it should be [5, 96]"),
        ({"r": None}, "NoneType"),
    ],
)
def test_peft_folders_that_are_refused(tiny, tmp_path, change, part):
    model = with_adapter(tiny(), rank=4)
    save_peft(tmp_path, model, "a")
    config = files.read_json(tmp_path / "adapter_config.json") | change
    (tmp_path / "adapter_config.json").write_bytes(files.to_json(config))
    other = tiny()
    with pytest.raises(CheckpointError, match=re.escape(part)) as caught:
        load_peft(tmp_path, other, "a")
    assert "\n" not in str(caught.value) and not lora_layers(other)
    with pytest.raises(CheckpointError, match="nowhere"):
        load_peft(tmp_path / "nowhere", other, "a")


# ------------------------------------------------------------------------------------------------ layers


def test_a_new_adapter_changes_nothing_but_the_names_it_adds(tiny):
    model = tiny(**KINDS["moe"])
    before, names = logits(model), list(model.state_dict())
    add_lora(model, "a")
    assert torch.equal(logits(model), before)
    assert [name for name in model.state_dict() if "lora_" not in name] == names == list(base_state_dict(model))
    assert not any(layer.training for layer in lora_layers(model).values())
    assert not isinstance(model.model.layers[0].mlp.gate, LoRALinear)
    per_layer = 4 + 3 * (4 + 1)
    assert len(lora_layers(model)) == 2 * per_layer
    A = model.model.layers[0].mlp.shared_experts[0].down_proj.matrices("a")[0]
    assert A.shape == (8, 96) and 0.9 * 96**-0.5 < A.abs().max() < 96**-0.5


def test_dropout_only_in_training(tiny):
    model = with_adapter(tiny(), dropout=0.5)
    ids = tokens()
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    assert not torch.equal(logits(model, ids), logits(model, ids))
    set_adapter(model, None)  # the base itself has none
    assert torch.equal(logits(model, ids), logits(model, ids))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_the_adapter_is_trained(tiny, name):
    model = with_adapter(tiny(**KINDS["moe"]), "first", targets=ATTENTION)
    with_adapter(model, "second", seed=2)
    before = {key: w.clone() for key, w in model.state_dict().items()}
    optimizers = build_optimizers(model.train(), name, 1e-2, 0.0)
    next_token_loss(model, tokens(length=40), tokens(length=40, seed=4)).backward()
    for optimizer in optimizers:
        optimizer.step()
    changed = {key for key, w in model.state_dict().items() if not torch.equal(w, before[key])}
    assert changed == {key for key in before if key.endswith("_second")}
    assert all((p.grad is not None) == key.endswith("_second") for key, p in model.named_parameters())
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    kept = sum(w.numel() * 4 for state in states for key, w in state.items() if key != "step")
    assert kept == sum(w.numel() * 4 for key, w in before.items() if key.endswith("_second")) * (1 + (name == "adamw"))


def test_switching_is_loading_one_alone(tiny):
    model = tiny()
    base = logits(model)
    with_adapter(model, "a", seed=1, targets=("q_proj", "down_proj"))
    with_adapter(model, "b", seed=2, rank=2, targets=("v_proj", "down_proj"))
    alone = {
        "a": logits(with_adapter(tiny(), "a", seed=1, targets=("q_proj", "down_proj"))),
        "b": logits(with_adapter(tiny(), "b", seed=2, rank=2, targets=("v_proj", "down_proj"))),
        None: base,
    }
    for name in ("a", "b", None, "a", None, "b"):
        set_adapter(model, name)
        assert torch.equal(logits(model), alone[name]), name
        trained = {key.rsplit("_", 1)[-1] for key, p in model.named_parameters() if p.requires_grad}
        assert trained == ({name} if name else set())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_and_back(tiny, kind, dtype):
    model = tiny(**KINDS[kind]).to(dtype)
    original = {key: w.clone() for key, w in model.state_dict().items()}
    with_adapter(model, alpha=3.7)
    apart, weights = logits(model), fingerprint(model)
    merge_lora(model)
    merge_lora(model)  # once is enough
    assert fingerprint(model) == weights
    assert not torch.equal(
        model.model.layers[0].self_attn.q_proj.weight, original["model.layers.0.self_attn.q_proj.weight"]
    )
    if dtype == torch.float32:
        torch.testing.assert_close(logits(model), apart, rtol=1e-4, atol=1e-4)
    unmerge_lora(model)
    state = model.state_dict()
    assert all(torch.equal(state[key].view(torch.uint8), w.view(torch.uint8)) for key, w in original.items())
    assert torch.equal(logits(model), apart)
    merge_lora(model)
    set_adapter(model, None)
    assert all(torch.equal(model.state_dict()[key], w) for key, w in original.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "moe"])
def test_compiled_is_eager(tiny, kind):
    model = with_adapter(tiny(**KINDS[kind])).train()
    compiled = copy.deepcopy(model)
    compile_blocks(compiled)
    for each in (model, compiled):
        next_token_loss(each, tokens(), tokens(seed=4)).backward()
    trained = [(p, q) for p, q in zip(model.parameters(), compiled.parameters(), strict=True) if p.requires_grad]
    assert trained and all((p.grad is None) == (q.grad is None) for p, q in trained)
    for p, q in trained:
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


def test_experts_keep_their_adapters_in_bf16(tiny):
    """Where the experts without adapters are one product of their weights."""
    model = tiny(**KINDS["moe"])
    ids = tokens(4, 40)
    base = logits(model, ids)
    with_adapter(model, targets=("experts.0.down_proj", "experts.3.up_proj"), alpha=64)
    exact = logits(model, ids)
    install(model, torch.bfloat16, torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = logits(model, ids).float()
        loss = next_token_loss(model.train(), ids, ids)
    assert (half - exact).abs().mean() < 0.2 * (base - exact).abs().mean()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    merge_lora(model.eval())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = logits(model, ids).float()
    assert (merged - exact).abs().mean() < 0.2 * (base - exact).abs().mean()


def test_bias_and_dtype_of_the_base_are_kept():
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(6, 10).to(torch.bfloat16))
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    before = holder(x)
    with_adapter(holder, targets=("0",), rank=2, alpha=4)
    A, B = holder[0].matrices("a")
    assert A.dtype == torch.float32 and holder(x).dtype == torch.bfloat16
    expected = before.float() + 2 * x.float() @ A.T @ B.T
    torch.testing.assert_close(holder(x).float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "config, part",
    [
        ({"rank": 0}, "rank 0"),
        ({"alpha": 0.0}, "alpha 0.0"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"targets": ()}, "targets"),
        ({"targets": ("q_proj", "wq")}, "'wq'; there are down_proj, gate_proj"),
        ({"targets": ("embed_tokens",)}, "embed_tokens"),
    ],
)
def test_wrong_configurations(tiny, config, part):
    model = tiny()
    with pytest.raises(ValueError, match=part):
        add_lora(model, "a", LoRAConfig(**config))
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_wrong_names(tiny):
    model = with_adapter(tiny())
    for name in ("", "a.b", "a/b"):
        with pytest.raises(ValueError, match="use letters"):
            add_lora(model, name)
    with pytest.raises(ValueError, match="already"):
        add_lora(model, "a")
    for name in ("update", "eval", "weight", "active"):  # not the layer's own
        add_lora(tiny(), name)
    with pytest.raises(ValueError, match="no adapter b; the model has a$"):
        set_adapter(model, "b")
    with pytest.raises(ValueError, match="no adapter b$"):
        save_adapter("never.pth", model, "b")
    set_adapter(model, None)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_lora(model)


# ------------------------------------------------------------------------------------------------ files


def test_adapter_file_there_and_back(tiny, tmp_path):
    path = tmp_path / "lora" / "a_64.pth"
    model = with_adapter(tiny(**KINDS["moe"]), rank=4, alpha=6, dropout=0.1)
    expected = logits(model)
    save_adapter(path, model, "a", {"steps": 3})
    assert checkpoint.load_meta(path) == {"steps": 3}
    content = torch.load(path, weights_only=True)
    assert content["lora"] == {"rank": 4, "alpha": 6, "dropout": 0.1, "targets": list(LoRAConfig().targets)}
    sizes = {name: w.numel() for name, w in content["model"].items()}
    assert sum(sizes.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "model.layers.0.mlp.experts.2.up_proj.lora_A" in sizes

    other, drawn = tiny(**KINDS["moe"]), torch.get_rng_state()
    assert load_adapter(path, other, "another") == {"steps": 3}
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(logits(other), expected)
    half = tiny(**KINDS["moe"]).to(torch.bfloat16)  # the base as it is exported
    load_adapter(path, half, "a")
    assert (logits(half).float() - expected).abs().mean() < 0.1
    merge_lora(other)
    load_adapter(path, other, "beside")  # what is merged is not the base
    assert torch.equal(logits(other), expected)


def test_weights_are_saved_without_adapters_or_merged(tiny, tmp_path):
    model = tiny(qk_norm=True)
    base = logits(model)
    with_adapter(model)
    adapted = logits(model)
    checkpoint.save(tmp_path / "base.pth", model)
    assert torch.equal(logits(checkpoint.load(tmp_path / "base.pth")[0]), base)
    merge_lora(model)
    checkpoint.save(tmp_path / "merged.pth", model)
    save_hf(tmp_path / "hf", model, TOKENIZER, torch.float32)
    for name in ("merged.pth", "hf"):
        torch.testing.assert_close(logits(checkpoint.load(tmp_path / name)[0]), adapted, rtol=1e-4, atol=1e-4)


def test_wrong_base_is_refused(tiny, tmp_path):
    path = tmp_path / "a.pth"
    model = with_adapter(tiny())
    save_adapter(path, model, "a", {"arguments": {"from_weight": "full_sft"}})
    save_peft(tmp_path / "peft", model, "a")
    nearly = tiny()
    with torch.no_grad():
        nearly.model.layers[1].self_attn.v_proj.weight[0, 0] += 0.01
    for other, part in (
        (tiny(seed=1), "other weights (full_sft) than sft_64.pth"),
        (nearly, "other weights (full_sft) than sft_64.pth"),
        (tiny(hidden_size=32), "other weights (full_sft) with hidden_size 64, head_dim 16 than sft_64.pth"),
        (tiny(**KINDS["moe"]), "num_experts 0"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(part)) as caught:
            load_adapter(path, other, "a", base="sft_64.pth")
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
        with pytest.raises(CheckpointError, match="other weights"):
            load_peft(tmp_path / "peft", other, "a")
        assert not lora_layers(other) and all(p.requires_grad for p in other.parameters())


def test_files_that_are_no_adapters(tiny, tmp_path):
    model, path = tiny(), tmp_path / "base.pth"
    checkpoint.save(path, model)
    with pytest.raises(CheckpointError, match="base.pth"):
        load_adapter(path, model, "a")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_adapter(tmp_path / "none.pth", model, "a")
    save_adapter(path, with_adapter(tiny()), "a")
    with pytest.raises(CheckpointError, match="it is a LoRA adapter"):
        checkpoint.load(path)
    content = torch.load(path, weights_only=True)
    content["model"].pop("model.layers.0.self_attn.q_proj.lora_B")
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="q_proj.lora_B is missing, it should be"):
        load_adapter(path, model, "a")
    torch.save(content | {"lora": {"rank": 8, "colour": "red", "targets": ["q_proj"]}}, path)
    with pytest.raises(CheckpointError, match="colour"):
        load_adapter(path, model, "a")
    assert not lora_layers(model)
