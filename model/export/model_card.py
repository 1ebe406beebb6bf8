"""README.md of an exported folder."""

from model.checkpoint import run_arguments
from model.formats import hf_config
from model.model import MiniMindLM


def model_card(name: str, model: MiniMindLM, meta: dict) -> str:
    """The shape, and what the run's meta says of data, budget and losses."""
    c, run = model.config, run_arguments(meta)
    experts = f", {c.num_experts} experts ({c.num_experts_per_tok} per token)" if c.is_moe else ""
    rows = {
        "architecture": hf_config(c)["architectures"][0],
        "parameters": f"{model.num_parameters():,}"
        + (f", {model.num_parameters(active=True):,} active per token" if c.is_moe else ""),
        "shape": f"{c.num_hidden_layers} layers of {c.hidden_size}, {c.num_attention_heads} heads, "
        f"{c.num_key_value_heads} key-value heads{experts}",
        "stage": meta.get("stage"),
        "trained from": run.get("from_weight"),
        "LoRA merged in": meta.get("merged"),
        "data": run.get("data_path") or ("the starter corpus" if run else None),
        "steps": f"{meta['steps']:,}" if "steps" in meta else None,
        "tokens": f"{meta['tokens']:,}" if "tokens" in meta else None,
        "training time": f"{meta['seconds']:,.0f} s" if "seconds" in meta else None,
        "held-out loss": f"{meta['val_loss']:.4f} nats per token" if meta.get("val_loss") is not None else None,
        "held-out bits per byte": f"{meta['val_bpb']:.4f}" if meta.get("val_bpb") is not None else None,
        "row length in training": run.get("max_seq_len"),
        "optimizer": run.get("optimizer"),
        "seed": run.get("seed"),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value is not None)
    unknown = "" if meta else "\nThe weights came without a record of their training.\n"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A MiniMind model, exported to a stock architecture: transformers, vLLM and SGLang load it without remote code.

| | |
| --- | --- |
{table}
{unknown}
```python
from transformers import pipeline

chat = pipeline("text-generation", "FOLDER")
print(chat([{{"role": "user", "content": "Who are you?"}}], max_new_tokens=128)[0]["generated_text"][-1]["content"])
```

Training on a small corpus makes a small model: it states wrong things with confidence.
"""
