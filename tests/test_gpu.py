"""What only a CUDA card can show, against the CPU's results: python -m pytest -m gpu, or bash scripts/check_gpu.sh."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_dpo
from dataset.chat import load_tokenizer
from dataset.lm_dataset import preference_dataset, pretrain_dataset, validation_batches
from model import checkpoint
from model.inference.cuda_step import CudaStep
from model.inference.engine import decoding_step, generate
from model.inference.sampling import SamplingParams
from model.model import LoRAConfig, add_lora
from tests.helpers import next_token_loss, shifted
from trainer.arguments import arguments
from trainer.optimizer import build_optimizers
from trainer.run import Run
from trainer.speed import matmul_peak

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")]
ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"dense": dict(qk_norm=True), "llama": {}, "moe": dict(qk_norm=True, num_experts=4, num_experts_per_tok=2)}
TINY = "--hidden_size 64 --num_hidden_layers 2 --max_seq_len 32 --batch_size 4 --log_interval 1".split()


@pytest.fixture(autouse=True)
def exact_fp32():
    """Other tests may have allowed TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gpu")
    words = "the cat sat on a mat 小猫 看 雨 and 3 + 4 = 7 in the old house 今天 天气".split()

    def text(n: int) -> str:
        return " ".join(words[(n * k + k * k) % len(words)] for k in range(3 + n % 9))

    def chat(n: int) -> list[dict]:
        return [{"role": "user", "content": text(n)}, {"role": "assistant", "content": text(n + 1)}]

    rows = {
        "text": [{"text": text(n) * 3} for n in range(200)],
        "pairs": [{"chosen": chat(n), "rejected": [chat(n)[0], chat(n + 5)[1]]} for n in range(60)],
    }
    for name, lines in rows.items():
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(content, encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in rows}


def ids_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(320, (rows, length), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_are_the_cpus(tiny, shape, lora):
    ours = tiny(**SHAPES[shape]).train()
    if lora:
        add_lora(ours, "mine", LoRAConfig(rank=4))
    theirs = copy.deepcopy(ours).cuda()
    ids, segments = ids_of(2, 100), torch.arange(100).div(40, rounding_mode="floor").expand(2, 100)
    for model, device in ((ours, "cpu"), (theirs, "cuda")):
        inputs = [t.to(device) for t in (ids, shifted(ids), segments)]
        next_token_loss(model, inputs[0], inputs[1], segment_ids=inputs[2]).backward()
    with torch.no_grad():
        difference = (
            ours(ids, segment_ids=segments).logits - theirs(ids.cuda(), segment_ids=segments.cuda()).logits.cpu()
        )
    assert difference.abs().max() < 1e-3
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if a.requires_grad:
            assert (a.grad - b.grad.cpu()).abs().max() <= 1e-3 * a.grad.abs().max() + 1e-6, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_optimizer_step_is_the_cpus(tiny, optimizer):
    ours = tiny(qk_norm=True).train()
    theirs = copy.deepcopy(ours).cuda()
    before = copy.deepcopy(ours.state_dict())
    for model, device in ((ours, "cpu"), (theirs, "cuda")):
        ids = ids_of(2, 60).to(device)
        next_token_loss(model, ids, shifted(ids)).backward()
        for each in build_optimizers(model, optimizer, learning_rate=1e-2):
            each.step()
    for name, w in ours.state_dict().items():
        moved = (w - before[name]).abs().max()
        assert (w - theirs.state_dict()[name].cpu()).abs().max() <= 0.05 * moved, name


def test_the_dpo_loss_is_the_cpus(tiny, data, tmp_path):
    rows = preference_dataset(data["pairs"], load_tokenizer(), 128, cache_dir=tmp_path, quiet=True)
    batch = next(iter(validation_batches(rows, 4)))
    policy, reference = tiny(vocab_size=6400, initializer_range=0.05), tiny(1, vocab_size=6400, initializer_range=0.05)
    args = arguments("dpo", "").parse_args([])
    vars(args).update(beta=0.1, loss="dpo", label_smoothing=0.0, length_normalize=False, simpo_gamma=0.5)
    expected, _ = train_dpo.dpo_loss(policy, batch, reference, args)
    on_card = {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
    found, _ = train_dpo.dpo_loss(policy.cuda(), on_card, reference.cuda(), args)
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)


# ------------------------------------------------------------------------------------------------ training


def losses_of(folder: Path, data: dict[str, Path], *flags: str) -> list[float]:
    argv = [*TINY, "--data_path", str(data["text"]), "--steps", "12", "--out_dir", str(folder), "--device", "cuda"]
    argv += ["--cache_dir", str(folder / "cache")]
    run = Run("pretrain", arguments("pretrain", "").parse_args([*argv, *flags]), minutes=1)
    rows, _ = run.rows(pretrain_dataset, "pretrain")
    for micro_batches in run.steps(rows):
        for batch in micro_batches:
            loss = next_token_loss(run.model, batch["input_ids"], batch["labels"])
            run.backward(loss, batch)
        run.update({})
    run.finish()
    log = [json.loads(line) for line in run.path(".jsonl").read_text().splitlines()]
    return [row["loss"] for row in log if "loss" in row]


@pytest.mark.parametrize("flags", ["", "--compile 1", "--use_moe 1", "--activation_checkpointing 1"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision_learns_as_fp32_does(tmp_path, data, dtype, flags):
    """fp16 with its loss scaler; compiled or not."""
    exact = losses_of(tmp_path / "fp32", data, "--dtype", "fp32", *(["--use_moe", "1"] if "moe" in flags else []))
    found = losses_of(tmp_path / dtype, data, "--dtype", dtype, *flags.split())
    assert exact[-1] < exact[0] - 1
    assert found[0] == pytest.approx(exact[0], rel=0.01)
    assert found[-1] == pytest.approx(exact[-1], rel=0.1)


def test_killed_and_resumed(tmp_path, data):
    """As from the shell, on the card: steps, samples and, as far as the card repeats itself, the losses."""
    files = ["--data_path", str(data["text"]), "--steps", "30", "--save_interval", "5", "--device", "cuda"]
    command = [sys.executable, str(ROOT / "train_pretrain.py"), *TINY, *files]
    subprocess.run([*command, "--out_dir", str(tmp_path / "whole")], check=True, capture_output=True, timeout=200)
    resume = [*command, "--out_dir", str(tmp_path / "parts"), "--from_resume", "1"]
    first = subprocess.Popen(resume, stderr=subprocess.DEVNULL)
    while first.poll() is None and not list((tmp_path / "parts").glob("*_resume/state_*.pt")):
        pass
    first.kill()
    first.wait()
    subprocess.run(resume, check=True, capture_output=True, timeout=200)
    logs = []
    for name in ("whole", "parts"):
        rows = map(json.loads, (tmp_path / name / "pretrain_64.jsonl").read_text().splitlines())
        logs.append([row for row in rows if "loss" in row])
    assert [(row["step"], row["tokens"]) for row in logs[0]] == [(row["step"], row["tokens"]) for row in logs[1]]
    assert [row["loss"] for row in logs[0]] == pytest.approx([row["loss"] for row in logs[1]], rel=1e-3)


@pytest.mark.parametrize("flags", ["", "--fsdp"])
def test_one_process_of_a_launcher(tmp_path, data, flags):
    """NCCL and FSDP2 with a single card."""
    env = os.environ | dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29533")
    files = ["--data_path", str(data["text"]), "--steps", "5", "--out_dir", str(tmp_path)]
    command = [sys.executable, str(ROOT / "train_pretrain.py"), *TINY, *files, "--device", "cuda", *flags.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert checkpoint.load(tmp_path / "pretrain_64.pth")[1]["steps"] == 5


def test_the_peak_is_that_of_large_products():
    """What the first launches cost is not taken for a slow card."""
    assert matmul_peak(torch.device("cuda"), torch.float16) > 1e12


# ------------------------------------------------------------------------------------------------ generation


@pytest.mark.parametrize("shape", SHAPES)
def test_the_engine_says_what_the_cpus_says(tiny, shape):
    model = tiny(**SHAPES[shape])
    prompts = [ids_of(1, n)[0].tolist() for n in (3, 40, 11, 70)]
    params = SamplingParams(temperature=0, max_new_tokens=24, stop_token_ids=())
    expected = [result.token_ids for result in generate(model, prompts, params)]
    found = [result.token_ids for result in generate(model.cuda(), prompts, params)]
    same = sum(a == b for ours, theirs in zip(expected, found, strict=True) for a, b in zip(ours, theirs, strict=True))
    assert same >= 0.9 * 4 * 24  # a near tie may fall the other way, and all after it
    assert model.generate(torch.tensor([prompts[1]]).cuda(), 24)[0, 40:].tolist()[:8] == found[1][:8]


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_recorded_steps_say_what_plain_ones_do(tiny, lora):
    """Sequences that begin and end at different steps, and outgrow the cache and what the first graphs read."""
    model = tiny(qk_norm=True).cuda()
    if lora:
        add_lora(model, "mine", LoRAConfig(rank=4))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(0, 0.1)
    prompts = [ids_of(1, n)[0].tolist() for n in (3, 200, 90, 400, 17)]
    params = [SamplingParams(0, max_new_tokens=n, stop_token_ids=()) for n in (30, 80, 200, 150, 60)]
    plain = [result.token_ids for result in generate(model, prompts, params, batch_size=4, compiled=False)]
    found = [result.token_ids for result in generate(model, prompts, params, batch_size=4, compiled=True)]
    assert list(map(len, found)) == list(map(len, plain))
    same = sum(a == b for ours, theirs in zip(found, plain, strict=True) for a, b in zip(ours, theirs, strict=True))
    assert same >= 0.9 * sum(map(len, plain))  # a near tie may fall the other way, and all after it


def test_a_recorded_step_takes_the_weights_as_they_are(tiny):
    """Rollouts: the weights change between two engines, and nothing that was recorded may go on with the old ones."""
    model, prompt = tiny().cuda(), ids_of(1, 10)[0].tolist()
    params = SamplingParams(0, max_new_tokens=20, stop_token_ids=())
    step = decoding_step(model)
    assert isinstance(step, CudaStep)
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        found = generate(model, [prompt], params, compiled=step)[0].token_ids
        assert found == generate(model, [prompt], params, compiled=False)[0].token_ids


def test_sampling_on_the_card_follows_the_probabilities(tiny):
    """A thousand draws of one token against the softmax, and the same seed twice."""
    model = tiny().cuda()
    prompt = ids_of(1, 10)[0].tolist()
    draws = [SamplingParams(temperature=1.0, top_k=5, max_new_tokens=1, stop_token_ids=(), seed=n) for n in range(1000)]
    found = [result.token_ids[0] for result in generate(model, [prompt] * 1000, draws, batch_size=250)]
    assert found == [result.token_ids[0] for result in generate(model, [prompt] * 1000, draws, batch_size=250)]
    with torch.no_grad():
        top, ids = model(torch.tensor([prompt]).cuda()).logits[0, -1].float().topk(5)
    for p, token in zip(top.softmax(-1).tolist(), ids.tolist(), strict=True):
        assert found.count(token) / 1000 == pytest.approx(p, abs=0.06)
