"""The agent: prompts that only grow, tokens that are trained, files of tasks, and runs that learn and go on.

pytest tests/test_agent.py
"""

import json
import random
import re
from functools import cache
from types import SimpleNamespace

import pytest
import torch

import train_agent
from dataset.chat import load_tokenizer, render_chat
from dataset.jsonl import DataError
from dataset.questions import Question, read_questions
from dataset.starter import chains
from dataset.starter.skills import Item, is_held_out
from model import checkpoint
from model.inference.tools import SCHEMAS, run_tool
from model.model import MiniMindConfig, MiniMindLM
from tests.helpers import next_token_loss
from tests.processes import Script, largest_difference, log, one_error, weights
from trainer.policy import policy_batches
from trainer.rewards import REWARDS
from trainer.rollout import Generator, Rollout, as_message
from trainer.tool_turns import CALL_ROUNDS, ToolTurns, carry_out, with_our_tools

TOOLS = {"role": "system", "content": "", "tools": json.dumps(SCHEMAS[:1])}
SHORT = "--max_seq_len 384 --batch_size 2 --group_size 8 --rows 2 --max_new_tokens 40 --measure 0 --sample_interval 1"
RUN = f"{SHORT} --dtype fp32 --device cpu --compile 0 --log_interval 1 --save_interval 1 --learning_rate 2e-3".split()


def task(question: str, truth: str) -> Question:
    return Question(1, "two_calls", [TOOLS, {"role": "user", "content": question}], "gt", [truth], False)


def said(*calls: tuple[str, dict], content: str = "") -> dict:
    return {"role": "assistant", "content": content, "tool_calls": [{"name": n, "arguments": a} for n, a in calls]}


def play_script(answers: list[dict], tokenizer) -> tuple[Rollout, list[list[int]]]:
    """A rollout in which the model says these things, token by token as the template has them; and its prompts."""
    question = task("?", "7")
    ids = render_chat(tokenizer, question.messages, add_generation_prompt=True)[0]
    rollout, prompts = Rollout(question, list(question.messages), ids, [False] * len(ids)), []
    for answer in answers:
        prompts.append(list(rollout.ids))
        whole, mask = render_chat(tokenizer, [question.messages[1], answer])
        sampled = [token for token, trained in zip(whole, mask, strict=True) if trained]
        rollout.ids += sampled
        rollout.trained += [True] * len(sampled)
        rollout.log_probs += [-1.0] * len(sampled)
        rollout.turns += 1
        rollout.messages.append(as_message(tokenizer, prompts[-1], sampled, cut=False))
        going_on = carry_out(rollout, tokenizer)
        assert going_on == bool(answer.get("tool_calls"))
    return rollout, prompts


SCRIPT = [
    said(("convert", {"value": 3, "unit": "km", "to": "m"}), ("calculator", {"expression": "1 +"}), content="先算两个"),
    said(("calculator", {"expression": "3000 + 4"})),
    {"role": "assistant", "content": "That is 3004."},
]


def test_prompts_only_grow_and_are_the_templates_own():
    """Each prompt is an exact prefix of the next one, and the whole is what the template writes of the conversation."""
    tokenizer = load_tokenizer()
    rollout, prompts = play_script(SCRIPT, tokenizer)
    for before, after in zip(prompts, [*prompts[1:], rollout.ids], strict=True):
        assert after[: len(before)] == before and len(after) > len(before)
    results = [run_tool(call["name"], call["arguments"]) for answer in SCRIPT[:2] for call in answer["tool_calls"]]
    tool = [{"role": "tool", "content": result} for result in results]
    conversation = [*task("?", "").messages, SCRIPT[0], *tool[:2], SCRIPT[1], tool[2], SCRIPT[2]]
    ids, mask = render_chat(tokenizer, conversation)
    newline = tokenizer.encode("\n").ids  # which the template writes behind the last answer
    assert rollout.ids + newline == ids
    assert rollout.trained + [False] * len(newline) == [bool(m) for m in mask]
    assert (rollout.calls, rollout.failed_calls) == (3, 1)


def test_what_the_model_did_not_say_is_no_label():
    """Labels are the sampled tokens, the end of each turn among them, and nothing else."""
    tokenizer = load_tokenizer()
    rollout, _ = play_script(SCRIPT, tokenizer)
    run = SimpleNamespace(
        args=SimpleNamespace(max_seq_len=512, rows=1), processes=SimpleNamespace(gather=lambda n: [n])
    )
    [batch] = policy_batches([rollout], {"advantages": [[1.0] * rollout.sampled]}, "tokens", run)
    labels = batch["labels"][batch["labels"] >= 0].tolist()
    assert labels == [token for token, trained in zip(rollout.ids, rollout.trained, strict=True) if trained]
    assert sum(token in tokenizer.stop_ids for token in labels) == len(SCRIPT)
    assert batch["tokens"] == rollout.sampled == len(labels)


def test_the_gradient_of_a_token_is_its_advantage():
    """At a ratio of 1 the loss is REINFORCE's, and a ratio beyond the cap counts as much as the cap."""
    torch.manual_seed(0)
    model = MiniMindLM(tiny_config())
    ids = torch.randint(20, 200, (2, 9))
    labels = torch.full((2, 9), -100)
    labels[:, 3:8] = ids[:, 4:]
    advantages = torch.randn(10)
    batch = {"input_ids": ids, "segment_ids": torch.ones(2, 9, dtype=torch.int32), "labels": labels}
    batch["advantages"] = advantages
    log_probs = model(ids).logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels >= 0]
    args = SimpleNamespace(weight_cap=2.0, max_new_tokens=9)
    for ratio, counts in ((1.0, 1.0), (1.5, 1.5), (7.0, 2.0)):
        old = None if ratio == 1 else log_probs.detach() - torch.tensor(ratio).log()
        model.zero_grad()
        train_agent.agent_loss(model, batch, old, None, args)[0].backward()
        expected = torch.autograd.grad(
            -(counts * advantages * log_probs).mean(), model.model.norm.weight, retain_graph=True
        )
        assert torch.allclose(model.model.norm.weight.grad, expected[0], atol=1e-6)


def test_calls_without_end_are_cut_off():
    tokenizer = load_tokenizer()
    endless = [said(("calculator", {"expression": "1 + 1"}))] * CALL_ROUNDS
    rollout, _ = play_script(endless, tokenizer)
    assert not rollout.truncated and rollout.calls == CALL_ROUNDS
    rollout.messages.append(endless[0])
    rollout.turns += 1
    assert not carry_out(rollout, tokenizer) and rollout.truncated


def test_a_tool_that_always_fails_is_told_once(capsys):
    """One line for a step in which every call gets an error back; each of them may cost something."""
    tokenizer, failing = load_tokenizer(), said(("calculator", {"expression": "1 +"}))
    play = ToolTurns(tokenizer, REWARDS["right"], SimpleNamespace(thinking=0, max_new_tokens=9, failed_call_cost=0.1))
    rollouts = [play_script([failing, {"role": "assistant", "content": "7"}], tokenizer)[0] for _ in range(20)]
    for _ in range(2):
        play.answer(SimpleNamespace(complete=lambda *args, **options: None), rollouts)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "all of 20 calls got an error back" in told[0] and "not an expression" in told[0]
    assert {rollout.reward for rollout in rollouts} == {0.9}


# ------------------------------------------------------------------------------------------------ the tasks


def other(rng: random.Random, lang: str, held: bool) -> Item:
    while is_held_out(key := f"fact|{rng.random()}") != held:
        pass
    return Item(f"What is {key}?", "A fact.", key)


@cache
def tasks() -> tuple[list[dict], list[dict]]:
    rng = random.Random(0)
    return chains.make_tasks(rng, 0.2, other), chains.make_heldout(rng, other)


def question_of(row: dict) -> str:
    return next(message["content"] for message in row["conversations"] if message["role"] == "user")


def test_tasks_are_unseen_when_held_out_and_as_many_in_either_language():
    train, held = tasks()
    asked = [{(row["skill"], question_of(row)) for row in rows} for rows in (train, held)]
    assert len(held) == len(asked[1]) == len(chains.SHARES) * chains.HELD_OUT and len(asked[0]) == len(train)
    assert not asked[0] & asked[1]
    assert {row["skill"] for row in train} == set(chains.SHARES)
    for kind in set(chains.SHARES) - {"call_or_answer"}:  # half of which other() makes
        chinese = [re.search(r"[一-鿿]", question_of(row)) for row in held if row["skill"] == kind]
        assert 0.4 < sum(map(bool, chinese)) / len(chinese) < 0.6


@pytest.mark.parametrize("make, count", [(chains.two_calls, 2), (chains.three_calls, 3), (chains.recovery, 1)])
def test_the_calls_of_a_task_lead_to_its_truth(make, count):
    for seed in range(200):
        task = make(random.Random(seed), ("zh", "en")[seed % 2])
        messages, last = chains.carry_out(task)
        results = [json.loads(message["content"]) for message in messages if message["role"] == "tool"]
        assert ["error" in result for result in results] == [True] * (make is chains.recovery) + [False] * count
        assert str(results[-1]["result"]) == last and chains.agent_row("?", task)["gt"] == [last]


def test_chains_of_three_are_never_demonstrated():
    """Where three calls work, each can be read from the question: none needs the result of another."""
    lengths = set()
    for seed in range(300):
        asked, *rest = chains.demonstration(random.Random(seed), ("zh", "en")[seed % 2])
        calls = [json.loads(message["tool_calls"])[0] for message in rest if message.get("tool_calls")]
        worked = ["error" not in message["content"] for message in rest if message["role"] == "tool"]
        if sum(worked) > 2:
            numbers = re.findall(r"\d+", json.dumps([call["arguments"] for call in calls]))
            assert not set(numbers) - set(re.findall(r"\d+", asked["content"]))
        lengths.add((len(calls), sum(worked)))
        assert not any("gt" in message for message in rest)
    assert lengths == {(2, 1), (2, 2), (3, 3)}


def test_minimind_files_are_read(tmp_path, capsys):
    """Their names of two tools become ours; rows with other tools, and those without a truth, are counted."""

    def row(*names: str, gt=("42",)) -> dict:
        tools = json.dumps([{"type": "function", "function": {"name": name, "parameters": {}}} for name in names])
        question = [{"role": "system", "content": "", "tools": tools}, {"role": "user", "content": "6 * 7?"}]
        return {"conversations": [*question, {"role": "assistant", "content": ""}], "gt": list(gt)}

    rows = [row("calculate_math"), row("calculate_math", "unit_converter", gt=[42, "7"]), row("get_current_weather")]
    rows += [row("calculate_math", gt=[])]
    path = tmp_path / "agent_rl.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    questions = with_our_tools(read_questions(path), str(path), quiet=False)
    offered = [[tool["function"]["name"] for tool in json.loads(q.messages[0]["tools"])] for q in questions]
    assert offered == [["calculator"], ["calculator", "convert"]] and questions[1].right == ["42", "7"]
    assert all(question.messages[-1]["role"] == "user" for question in questions)
    told = capsys.readouterr()
    assert "1 of 4 rows left out" in told.err and "1 of 3 questions left out" in told.err
    path.write_text(json.dumps(rows[2]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="all 1 questions offer tools that are not built in"):
        with_our_tools(read_questions(path), str(path), quiet=True)


# ------------------------------------------------------------------------------------------------ runs


def tiny_config(**more) -> MiniMindConfig:
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return MiniMindConfig(**shape, intermediate_size=96, vocab_size=load_tokenizer().get_vocab_size(), **more)


def teach(path, rows: list[tuple[list[int], list[int]]], steps: int, **more) -> None:
    """Save weights that have learnt these rows, (ids, mask), nearly by heart."""
    longest = max(len(ids) for ids, _ in rows)
    input_ids, labels = (
        torch.zeros(len(rows), longest - 1, dtype=torch.long),
        torch.full((len(rows), longest - 1), -100),
    )
    for i, (ids, mask) in enumerate(rows):
        ids, mask = torch.tensor(ids), torch.tensor(mask)
        input_ids[i, : len(ids) - 1] = ids[:-1]
        labels[i, : len(ids) - 1] = torch.where(mask[1:] == 1, ids[1:], -100)
    torch.manual_seed(0)
    model = MiniMindLM(tiny_config(**more))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        loss = next_token_loss(model, input_ids, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    checkpoint.save(path, model, {"stage": path.stem})


QUESTIONS = ["2 + 4?", "3 + 5?"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with weights that call in half of the cases, the file of their tasks, and a MoE that can answer."""
    folder, tokenizer = tmp_path_factory.mktemp("agent"), load_tokenizer()
    rows = []
    for question in QUESTIONS:
        expression = question[:-1]
        for calls in (True, False):
            result = run_tool("calculator", {"expression": expression})
            talk = [said(("calculator", {"expression": expression})), {"role": "tool", "content": result}] * calls
            truth = str(json.loads(result)["result"])
            answer = {"role": "assistant", "content": truth if calls else "I don't know."}
            rows.append(render_chat(tokenizer, [TOOLS, {"role": "user", "content": question}, *talk, answer]))
        task = [TOOLS, {"role": "user", "content": question}, {"role": "assistant", "content": ""}]
        with open(folder / "tasks.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"skill": "sum", "conversations": task, "gt": [truth]}) + "\n")
    teach(folder / "dense.pth", rows, steps=140)
    teach(folder / "moe.pth", rows[1::2], steps=30, num_experts=4, num_experts_per_tok=1, qk_norm=True)
    return folder


def job(world, out, *more) -> list:
    data = ["--data_path", world / "tasks.jsonl", "--val_path", world / "tasks.jsonl"]
    return ["train_agent.py", *data, "--from_weight", world / "dense.pth", "--out_dir", out, *RUN, *more]


def test_the_engine_says_what_the_model_does(world):
    """Sampled log-probabilities are those of the model that reads the whole conversation at once."""
    model, tokenizer = checkpoint.load(world / "dense.pth")[0], load_tokenizer()
    args = SimpleNamespace(thinking=0, max_new_tokens=40, failed_call_cost=0.25)
    play = ToolTurns(tokenizer, REWARDS["right"], args)
    questions = read_questions(world / "tasks.jsonl")
    rollouts = [play.begin(question, i, member) for i, question in enumerate(questions) for member in range(12)]
    with Generator(model, tokenizer, torch.float32, 384) as generator:
        play.answer(generator, rollouts)
    assert 3 < sum(rollout.calls > 0 for rollout in rollouts) and {1.0, 0.0} <= {r.reward for r in rollouts}
    for rollout in rollouts:
        ids = torch.tensor([rollout.ids])
        log_probs = model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
        own = log_probs[torch.tensor(rollout.trained[1:])]
        gap = (own - torch.tensor(rollout.log_probs)).abs()  # nan where the engine was not asked
        assert len(own) == len(rollout.log_probs) and gap.nan_to_num().max() < 1e-4
        assert rollout.member or gap.isfinite().all()
        right = REWARDS["right"](rollout.question, rollout.messages) if not rollout.truncated else 0.0
        assert rollout.reward == right - 0.25 * rollout.failed_calls
    # Where a result does not fit any more, the rollout ends at the last place that the trainer's rows have.
    once = [rollout for rollout in rollouts if rollout.calls == 1 and rollout.member < 4]
    longest, ends = max(len(rollout.ids) for rollout in once), set()
    for room in range(longest - 30, longest, 3):
        rollouts = [play.begin(question, i, member) for i, question in enumerate(questions) for member in range(4)]
        with Generator(model, tokenizer, torch.float32, room) as generator:
            play.answer(generator, rollouts)
        assert all(len(rollout.ids) == len(rollout.trained) <= room for rollout in rollouts)
        assert all(sum(rollout.trained) == len(rollout.log_probs) for rollout in rollouts)
        ends |= {rollout.trained[-1] for rollout in rollouts if rollout.truncated and len(rollout.ids) == room}
    assert False in ends  # within a result


def test_a_run_learns_to_call_and_goes_on_after_a_kill(world, tmp_path):
    """More answers are right in the end than at the beginning; killed in between, the weights are the same."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = Script(tmp_path, job(world, whole, "--steps", 8, "--measure", 2)).wait()
    assert done.code == 0, done.err
    rows = [row for row in log(whole / "agent_64.pth") if "reward" in row]
    assert rows[0]["reward"] < 0.8 and sum(row["reward"] for row in rows[-3:]) / 3 > rows[0]["reward"] + 0.1
    assert all(row["engine_gap"] < 1e-4 for row in rows) and rows[0]["calls"] > 0
    assert "sum, 2" in done.out and (whole / "agent_64.md").read_text(encoding="utf-8").count("## step") >= 5
    killed = Script(tmp_path, job(world, parts, "--steps", 8, "--measure", 2))
    killed.wait_for_state(parts, step=3)
    killed.kill()
    assert not (parts / "agent_64.pth").exists()
    Script(tmp_path, job(world, parts, "--steps", 8, "--measure", 2, "--from_resume", 1)).succeed()
    ours, theirs = weights(whole / "agent_64.pth"), weights(parts / "agent_64.pth")
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_adapters_and_experts_learn_too(world, tmp_path):
    """Even from coins, which differ whatever is said; the weights below an adapter stay as they are."""
    before = (world / "dense.pth").read_bytes()
    flags, moe = ["--steps", 2, "--reward", "random", "--beta", 0.01], world / "moe.pth"
    jobs = [job(world, tmp_path, *flags, "--lora_name", "caller"), job(world, tmp_path, *flags, "--from_weight", moe)]
    Script(tmp_path, *jobs).succeed()
    adapter = weights(tmp_path / "lora" / "caller_64.pth")
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in adapter.items()), list(adapter)
    assert largest_difference(moe, tmp_path / "agent_64_moe.pth") > 1e-5
    assert (world / "dense.pth").read_bytes() == before


def test_what_cannot_be_is_told_in_one_line(world, tmp_path):
    (tmp_path / "none.jsonl").write_text(json.dumps({"conversations": [{"role": "user", "content": "?"}]}) + "\n")
    none = ["--data_path", tmp_path / "none.jsonl"]
    for code, more, words in (
        (1, none, "no row has an answer to check against"),
        (1, ["--max_seq_len", 64], "no question leaves room for an answer"),
        (2, ["--weight_cap", 0], "--weight_cap"),
        (2, ["--failed_call_cost", -1], "--failed_call_cost"),
    ):
        one_error(Script(tmp_path, job(world, tmp_path / "out", *more, "--steps", 1)).wait(), code, words)
