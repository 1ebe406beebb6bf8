"""Our models in EleutherAI's lm-evaluation-harness: any of its tasks, without a server.

python -m evaluation.lm_eval_model --model out/full_sft_512.pth --tasks arc_easy,hellaswag --num_fewshot 5
python -m evaluation.lm_eval_model --model PATH --tasks my_task --include_path FOLDER_OF_YAML_FILES

Its task files load their data from the hub; offline, a task of your own names local files (dataset_path: json).
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import cli

if not importlib.util.find_spec("lm_eval"):
    sys.exit("error: the adapter to lm-evaluation-harness needs the package lm_eval: pip install lm_eval")

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from evaluation.asking import Examinee, exact_dtype, is_chat_model
from evaluation.report import Bar
from model.checkpoint import CheckpointError
from model.device import DTYPES
from model.files import write_bytes
from model.inference.chatbot import AnswerSettings, Chatbot, load_chatbot
from model.inference.engine import SamplingParams, generate_each
from model.inference.likelihood import Item

ANSWER_TOKENS = 256  # what the harness takes where a task says nothing


class MiniMindEvalLM(TemplateLM):
    """A model as the harness asks it.

    begins: texts begin with the token that stood before each text in training; False: with nothing, as the harness
    has it for a Hugging Face folder (HFLM). Chats are rendered by render_chat whatever `begins` says, and what the
    harness holds is only their text: its tokens are looked up, so markers in a question stay text."""

    def __init__(self, bot: Chatbot, begins: bool = True):
        super().__init__()
        self.bot, self.begins = bot, begins
        self.examinee = Examinee(bot, chat=True)
        self.chats: dict[str, list[int]] = {}  # by the text that stands for it

    @property
    def eot_token_id(self) -> int:
        return self.bot.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Before a text that has no context."""
        return self.examinee.beginning[-1] if self.begins else self.bot.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return f"{self.bot.name}-{self.bot.tokenizer.chat_hash[:16]}".replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if string in self.chats:
            return self.chats[string]
        if self.begins and add_special_tokens is not False:
            return self.bot.encode(string)
        return self.bot.tokenizer.encode(string, add_special_tokens=False).ids

    def apply_chat_template(self, history: list[dict], add_generation_prompt: bool = True) -> str:
        """A text that stands for the tokens of the conversation; two that differ never have the same."""
        opened = "" if add_generation_prompt else history[-1]["content"]  # the answer's first words are given
        turns = history if add_generation_prompt else history[:-1]
        ids = self.bot.encode(turns) + (self.examinee.continuation(opened) if opened else [])
        text = "".join(f"[{turn['role']}]\n{turn['content']}\n" for turn in turns) + f"[assistant]\n{opened}"
        while self.chats.setdefault(text, ids) != ids:
            text = f"\u200b{text}"
        return text

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "render_chat"

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context in self.chats:
            return self.chats[context], self.examinee.continuation(continuation)
        return super()._encode_pair(context, continuation)

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """[((context, continuation), their ids)] -> (log-probability in nats, whether greedy), in order."""
        by_context: dict[tuple, list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            keep = self.bot.max_len + 1 - len(continuation)  # as HFLM: what is too long loses its beginning
            by_context.setdefault(tuple(context[-max(keep, 1) :]), []).append(i)
        items = [Item(list(context), [requests[i][2] for i in places]) for context, places in by_context.items()]
        bar = Bar("log-likelihoods", len(items))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for places, scores in zip(by_context.values(), self.examinee.score(items, bar), strict=True):
            for i, score in zip(places, scores, strict=True):
                results[i] = tuple(score)
        bar.close()
        return results

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the model's context."""
        totals = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.bot.max_len, context_len=1
            )
            pairs = [(("", ""), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(logprob for logprob, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop string, a stop token or the limit, greedy unless the task says otherwise."""
        prompts, params = [], []
        for n, request in enumerate(requests):  # a task may repeat one, for other samples
            context, asked = request.args
            until = asked.get("until") or []
            until = [until] if isinstance(until, str) else [stop for stop in until if stop]
            # Where both do not fit, the answer keeps half of the context at most, and the prompt its end.
            new = int(asked.get("max_gen_toks", asked.get("max_tokens", ANSWER_TOKENS)))
            ids = self.tok_encode(context)[-(self.bot.max_len - min(new, self.bot.max_len // 2)) :]
            new = min(new, self.bot.max_len - len(ids))
            sampled = asked.get("do_sample") and asked.get("temperature", 1.0)
            params.append(
                SamplingParams(
                    temperature=float(asked.get("temperature", 1.0)) if sampled else 0.0,
                    top_p=float(asked.get("top_p", 1.0)), max_new_tokens=new, stop=until,
                    stop_token_ids=tuple(self.bot.stop_ids), seed=n,
                )
            )  # fmt: skip
            prompts.append(ids)
        answers = [""] * len(requests)
        bar = Bar("answers", len(requests))
        options = {"max_len": self.bot.max_len, "compiled": self.bot.step}
        each = generate_each(self.bot.model, prompts, params, self.bot.tokenizer, **options)
        for done, (i, result) in enumerate(each, 1):
            answers[i] = result.text
            bar(done)
        bar.close()
        return answers


def load(path: Path, args: argparse.Namespace) -> MiniMindEvalLM:
    device = cli.find_device(args.device)
    settings = AnswerSettings(args.max_seq_len)
    bot = load_chatbot(path, device, exact_dtype(device, args.dtype), settings, tokenizer=args.tokenizer)
    if not isinstance(bot, Chatbot):
        raise CheckpointError(f"{path} is of another architecture: lm_eval --model hf --model_args pretrained={path}")
    return MiniMindEvalLM(bot, bool(args.begins))


def main() -> None:
    parser = cli.ArgumentParser(usage="python -m evaluation.lm_eval_model [options]", description=__doc__)
    cli.add_model_flags(parser, cli.ROOT / "out")
    add = parser.add_argument_group("the harness").add_argument
    add("--tasks", required=True, metavar="A,B", help="its names, or those of YAML files in --include_path")
    add("--include_path", metavar="DIR", help="folder of task files of your own")
    add("--num_fewshot", type=int, help="worked examples (default: as the task says)")
    add("--limit", type=int, help="the first so many questions of each task")
    add("--chat", type=cli.flag, metavar="{0,1}", help="1 = as --apply_chat_template (default: 0 for weights "
        "of pretraining)")  # fmt: skip
    add("--begins", type=int, choices=(0, 1), default=1, help="1 = a text begins with the token that stood before each "
        "text in training, 0 = with nothing, as the harness has it for a Hugging Face folder (default: 1)")  # fmt: skip
    add("--output_path", metavar="FILE", help="all results as JSON")
    add("--device", help="cuda, mps or cpu (default: the best one found)")
    add("--dtype", choices=tuple(DTYPES), help="default: fp32 on a CPU, elsewhere bf16 where the hardware does it")
    add("--max_seq_len", type=int, help="tokens of context (default: as it was trained)")
    args = parser.parse_args()
    cli.check_model_flags(parser, args)
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    path = cli.model_path(args)
    lm = load(path, args)
    manager = TaskManager(include_path=args.include_path)
    names = args.tasks.split(",")
    if unknown := [name for name in names if name not in manager.all_tasks and not Path(name).exists()]:
        raise cli.UsageError(f"--tasks {unknown[0]}: the harness has no such task; --include_path names a folder of "
                             "your own")  # fmt: skip
    chat = is_chat_model(lm.bot, path) if args.chat is None else args.chat
    options = {"num_fewshot": args.num_fewshot, "limit": args.limit, "bootstrap_iters": 0}
    results = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, apply_chat_template=chat, **options)
    print(make_table(results))
    if args.output_path:
        content = json.dumps(results, ensure_ascii=False, default=str)
        write_bytes(Path(args.output_path), content.encode())


if __name__ == "__main__":
    cli.run(main)
