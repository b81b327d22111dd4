"""Talk to a model in the terminal, or get one answer.

Sizes are read from the weights' sidecar; a model that was only pretrained continues your text instead of answering.

    python eval_llm.py                                              # chat with out/full_sft_*.pth
    python eval_llm.py --prompt "写一个Python函数fib(n)" --temperature 0
    python eval_llm.py --weight pretrain --prompt "人工智能"
    python eval_llm.py --load_from ./MiniMind2                      # a folder in transformers format
"""

import argparse
import sys

import torch

from model.chat import encode_text, render
from model.generation import load_folder, load_for_inference, reply, sampling_options
from trainer.arguments import ROOT, add_model_flags, friendly_errors, input_path, stated_sizes, weights_dir, zero_or_one
from trainer.hardware import choose_device, choose_dtype
from trainer.trainer_utils import setup_seed

# asked one after the other by --auto 1; add your own
PROMPTS = [
    "你是谁？",
    "中国的首都是哪里？",
    "为什么天空是蓝色的？",
    "写一个Python函数fib(n)返回第n个斐波那契数（n>=0），用迭代实现，并给出简单测试。",
    "What is the capital of France?",
    "Give me some advice for learning to program.",
]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Talk to a model", formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--load_from", default="model", help="model: native weights of --save_dir; else a folder in transformers format"
    )
    add("--save_dir", "--out_dir", default=str(ROOT / "out"), help="folder of the native weights")
    add("--weight", default="full_sft", help="name of the native weights")
    add("--tokenizer_path", default=str(ROOT / "model"), help="folder of the tokenizer of native weights")
    add("--prompt", default=None, help="answer this and end; without it, chat")
    add("--auto", type=zero_or_one, default=0, help="1: ask the built-in questions instead of you")
    add("--system", default="", help="system prompt")
    add("--historys", "--history", type=int, default=0, help="earlier turns (question and answer) that are shown again")
    add("--open_thinking", type=zero_or_one, default=None, help="1: think first, 0: do not; unset: as the model likes")
    add("--max_new_tokens", type=int, default=512)
    add("--temperature", type=float, default=0.85, help="0: greedy, always the likeliest token")
    add("--do_sample", type=zero_or_one, default=1, help="0: greedy")
    add("--top_p", type=float, default=0.85)
    add("--top_k", type=int, default=50)
    add("--repetition_penalty", type=float, default=1.0)
    add("--seed", type=int, default=None, help="the same seed gives the same answers")
    add("--device", default="auto")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="auto: half on CUDA")
    add("--show_speed", type=zero_or_one, default=1, help="1: print tokens/s after each answer")
    add("--trust_remote_code", action="store_true", help="run the code inside a --load_from folder")
    add_model_flags(parser)
    return parser.parse_args(argv)


def init_model(args):
    """(model, tokenizer, ModelInfo) as the flags say."""
    device = choose_device(args.device)
    dtype = torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype)
    if args.dtype == "auto" and device.startswith("cuda"):
        dtype = getattr(torch, choose_dtype("auto", device))
    if args.load_from == "model":
        save_dir, tokenizer = weights_dir(args.save_dir), input_path(args.tokenizer_path)
        return load_for_inference(args.weight, save_dir, tokenizer, stated_sizes(args), device, dtype)
    return load_folder(input_path(args.load_from), device, dtype, args.trust_remote_code)


def prompt_ids(args, tokenizer, info, history: list[dict], question: str) -> list[int]:
    """Token ids of what the model is shown: a rendered conversation, or plain text after the start token."""
    if info.continues_text:
        return [tokenizer.bos_token_id, *encode_text(tokenizer, question)]
    messages = [{"role": "system", "content": args.system}] if args.system else []
    messages += history[len(history) - 2 * args.historys :] if args.historys else []
    messages.append({"role": "user", "content": question})
    thinking = {} if args.open_thinking is None else {"open_thinking": bool(args.open_thinking)}
    return render(tokenizer, messages, add_generation_prompt=True, **thinking).input_ids


def answer(args, model, tokenizer, info, history: list[dict], question: str) -> str:
    """Print the answer as it comes, and its speed; returns it."""
    ids = prompt_ids(args, tokenizer, info, history, question)
    options = sampling_options(
        args.temperature if args.do_sample else 0.0, args.top_p, args.top_k, args.repetition_penalty
    )
    if args.seed is not None:
        setup_seed(args.seed)
    text, tokens, seconds = reply(model, tokenizer, ids, args.max_new_tokens, stream=True, **options)
    if args.show_speed:
        print(f"[Speed]: {tokens / seconds:.1f} tokens/s ({tokens} tokens)", file=sys.stderr)
    return text


def questions(args):
    """The prompts to answer: one, the built-in ones, or what is typed until an empty line or the end of the input."""
    if args.prompt is not None:
        yield args.prompt
    elif args.auto:
        for question in PROMPTS:
            print(f"\n> {question}")
            yield question
    else:
        print("type a question; an empty line ends")
        while True:
            try:
                question = input("> ").strip()
            except EOFError:
                return
            if not question:
                return
            yield question


def main(args):
    model, tokenizer, info = init_model(args)
    if args.prompt is None:
        print(f"{info.path}" + (": only pretrained, it continues your text" if info.continues_text else ""))
    history = []
    for question in questions(args):
        text = answer(args, model, tokenizer, info, history, question)
        history += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stdin):  # a console of another encoding must not break Chinese
        stream.reconfigure(encoding="utf-8", errors="replace")
    with friendly_errors():
        main(parse_args())
