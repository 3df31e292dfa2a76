"""``skv generate``: text from a model whose cache is compressed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from skv_compile.commands import common
from skv_compile.commands.screen import Screen

HELP = "generate text with a compressed cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The prompt and how much to write."""
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="what to ask")
    prompt.add_argument("--prompt-file", metavar="F", help="read the prompt from F ('-': stdin)")
    parser.add_argument("--raw", action="store_true", help="do not apply the chat template")
    parser.add_argument(
        "--max-new-tokens", type=common.positive, default=128, metavar="N", help="at most (128)"
    )
    common.add_model_arguments(parser)


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Load, compile, generate; the text goes to standard output as it comes."""
    prompt = _prompt(args)
    chosen = common.overrides(args)
    import torch
    from transformers import TextStreamer

    import skv_compile as skv
    from skv_compile import models

    with screen.step("Model") as update:
        loaded = models.load(args.model, report=update)
    model, tokenizer = skv.compile(loaded.model, **chosen), loaded.tokenizer
    inputs = encode(tokenizer, prompt, raw=args.raw).to(model.device)
    length = inputs["input_ids"].shape[1]
    screen.note("Reading the prompt, then compiling: the second token takes longest")
    if screen.live:  # words appear as they are made
        printer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        timer = common.TokenTimer(then=printer)
    else:
        timer = common.TokenTimer()
    with torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            streamer=timer,
        )
    new = out.sequences[0, length:]
    text = tokenizer.decode(new, skip_special_tokens=True)
    if not screen.live:
        screen.write(text)
    cache = out.past_key_values
    speed = timer.speed()
    rate = speed["tokens_per_second"]
    screen.note(
        f"{length} + {len(new)} tokens; cache {common.size(cache.resident_bytes)} instead of "
        f"{common.size(cache.dense_bytes)}, {cache.bits_per_coordinate:.3f} bits per coordinate"
        + (f"; {rate:.1f} tokens/s after the first {common.WARM_UP_STEPS}" if rate else "")
    )
    return {
        "model": args.model,
        "device": common.device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompt_tokens": length,
        "new_tokens": len(new),
        "text": text,
        "cache": cache.summary(),
        "speed": speed,
    }


def encode(tokenizer: Any, prompt: str, *, raw: bool = False) -> Any:
    """The prompt as the model wants to read it: in its chat template, when it has one."""
    if raw or not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


def _prompt(args: argparse.Namespace) -> str:
    """The prompt's text, from wherever the arguments say."""
    if args.prompt is not None:
        text = args.prompt
    elif args.prompt_file == "-":
        text = sys.stdin.read()
    else:
        try:
            text = Path(args.prompt_file).read_text(encoding="utf-8")
        except OSError as error:
            reason = error.strerror or str(error)
            raise common.UsageError(f"--prompt-file {args.prompt_file}: {reason}") from error
        except UnicodeDecodeError as error:
            raise common.UsageError(f"--prompt-file {args.prompt_file} is not UTF-8") from error
    if not text.strip():
        raise common.UsageError("the prompt is empty")
    return text
