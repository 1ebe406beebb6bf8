"""The exported folder in transformers, peft and trl, without code of ours: `pytest tests/test_export.py`."""

import pytest

from dataset.chat import load_tokenizer
from model.export.huggingface import save_hf


@pytest.fixture
def folder(tiny, tmp_path):
    import torch

    model = tiny(vocab_size=6400, qk_norm=True)
    save_hf(tmp_path / "hf", model, load_tokenizer(), torch.float32)
    return str(tmp_path / "hf")


def test_pipeline_generates(folder):
    from transformers import pipeline

    chat = pipeline("text-generation", folder, device="cpu")
    answer = chat([{"role": "user", "content": "hi"}], max_new_tokens=4, do_sample=False)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


def test_peft_trains_a_step(folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["q_proj"]))
    ids = AutoTokenizer.from_pretrained(folder)("hello", return_tensors="pt")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_trl_trains_a_step(folder, tmp_path, method):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    common = dict(output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=2, report_to="none")
    common |= dict(use_cpu=True, bf16=False, save_strategy="no", gradient_checkpointing=False)
    question, good = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "a"}]
    bad = [{"role": "assistant", "content": "b"}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if method == "sft":
        rows = Dataset.from_list([{"messages": question + good}] * 2)
        trainer = SFTTrainer(folder, args=SFTConfig(**common), train_dataset=rows, processing_class=tokenizer)
    else:
        rows = Dataset.from_list([{"prompt": question, "chosen": good, "rejected": bad}] * 2)
        trainer = DPOTrainer(folder, args=DPOConfig(**common), train_dataset=rows, processing_class=tokenizer)
    assert trainer.train().training_loss > 0
