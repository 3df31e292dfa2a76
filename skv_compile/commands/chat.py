"""``skv chat``: a conversation in the terminal, beside a live picture of the cache."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from typing import TYPE_CHECKING, Any

from skv_compile.commands import common
from skv_compile.commands.screen import Screen
from skv_compile.errors import SkvError

if TYPE_CHECKING:
    from skv_compile.chat import Answer, Conversation
    from skv_compile.commands.live import View

HELP = "chat with a model, beside a live picture of its cache"

CONTEXT = 4096
COMMANDS = {
    "/help": "these commands",
    "/cache": "a picture of the cache",
    "/reset": "forget the conversation",
    "/quit": "leave (so does Ctrl-D)",
}
KEYS = "Ctrl-C stops an answer. A line that begins with // is said from its second / on."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, how it answers, and the settings of its cache."""
    parser.add_argument(
        "model",
        nargs="?",
        default="demo",
        metavar="MODEL",
        help="Hugging Face id, local folder, GGUF file, or 'demo' (the default)",
    )
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument(
        "--context",
        type=common.positive,
        metavar="N",
        help=f"tokens of the whole conversation (default: {CONTEXT}, or what the model can do)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=common.positive,
        default=512,
        metavar="N",
        help="of one answer (default: 512)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="draw tokens at this temperature; 0, the default, takes the most likely one",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (0)")
    common.add_cache_arguments(parser)


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Load, then answer line after line until the input ends."""
    if not 0 <= args.temperature < float("inf"):
        raise common.UsageError(f"--temperature {args.temperature}: must be 0 or more")
    chosen = common.overrides(args)
    import torch

    import skv_compile as skv
    from skv_compile import models
    from skv_compile.chat import Conversation

    with screen.step("Model") as update:
        loaded = models.load(args.model, report=update)
    model, config = skv.compile(loaded.model, **chosen), skv.Config(**chosen)
    context = _context(args, model)
    talk = Conversation(model, loaded.tokenizer, context, config, args.system)
    if not loaded.tokenizer.chat_template:
        screen.note("This model has no chat template: it goes on with your lines as they are")
    torch.manual_seed(args.seed)
    return Chat(args, screen, talk).run()


def _context(args: argparse.Namespace, model: Any) -> int:
    """Tokens of the cache."""
    text = model.config.get_text_config(decoder=True)
    most = getattr(text, "max_position_embeddings", None)
    if args.context is None:
        return min(CONTEXT, most or CONTEXT)
    if most and args.context > most:
        raise common.UsageError(
            f"--context {args.context}: {args.model} was made for at most {most} tokens"
        )
    return args.context


class Chat:
    """The loop over lines. On a terminal it draws; otherwise it writes an answer a line."""

    def __init__(self, args: argparse.Namespace, screen: Screen, talk: Conversation) -> None:
        from skv_compile.commands.live import View

        self.args, self.screen, self.talk = args, screen, talk
        self.terminal = screen.live and sys.stdin.isatty()
        self.view: View = View(screen.out, talk.cache)
        self.turns: list[dict[str, Any]] = []
        self.refused = 0
        self._warm = False  # the decoding step has been compiled

    def run(self) -> dict[str, Any]:
        if self.terminal:
            self.screen.note(f"{self.args.model}: say something. {' '.join(COMMANDS)}")
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (input() then edits and remembers lines)
        said = ""
        while True:
            try:
                if said:
                    self.screen.note(said)
                    said = ""
                line = self._line()
                if line is None or line == "/quit":
                    break
                self._take(line)
            except SkvError as error:
                self.refused += 1
                said = f"error: {error}"
            except KeyboardInterrupt:  # at any moment but in an answer
                if not self.terminal:
                    raise
                said = "\nCtrl-D or /quit leaves"
        # Who types can mend it at once; a pipe has to hear of it.
        return {**self._record(), "exit_code": 2 if self.refused and not self.terminal else 0}

    def _line(self) -> str | None:
        """What is typed or piped in next, stripped; None at the end."""
        try:
            if self.terminal:
                return input("\n> ").strip()
            line = sys.stdin.readline()
            return line.strip() if line else None
        except EOFError:
            self.screen.write("")
            return None
        except UnicodeDecodeError as error:
            self.refused += 1
            self.screen.note(f"error: the input is not UTF-8: {error}; the chat ends here")
            return None

    def _take(self, line: str) -> None:
        if not line:
            return
        if line.startswith("//"):
            self._answer(line[1:])
        elif not line.startswith("/"):
            self._answer(line)
        elif line == "/help":
            for name, what in COMMANDS.items():
                self.screen.note(f"{name:<8} {what}")
            self.screen.note(KEYS)
        elif line == "/reset":
            self.talk.reset()
            self.view.forget()
            self.screen.note("The conversation is forgotten")
        elif line == "/cache":
            self.view.look()
            self.screen.print(self.view.picture(self.screen.out.width))
        else:
            raise common.UsageError(
                f"there is no command {line.split()[0]}; there are {' '.join(COMMANDS)}. "
                "A message that begins with / is typed with //"
            )

    # ------------------------------------------------------------ an answer

    def _answer(self, text: str) -> None:
        """Let the model answer, show it, and keep a record of it."""
        from skv_compile.chat import Stop
        from skv_compile.commands.live import Words

        stop, words = Stop(), Words(self.talk.tokenizer)
        timer = common.TokenTimer(each=self.view.tick, then=words)
        self.view.begin(words, timer, stop, compiles=not self._warm)
        try:
            if self.terminal:
                with stop.on_interrupt(), self.view.shown():
                    answer = self._ask(text, timer, stop)
            else:
                answer = self._ask(text, timer, stop)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and not self.terminal:
                raise
            self._failed(error, stop)
            return
        speed = timer.speed(left_out=0 if self._warm else common.WARM_UP_STEPS)
        self._warm |= len(answer.tokens) > 1
        self._note(text, answer, speed)

    def _ask(self, text: str, timer: Any, stop: Any) -> Answer:
        heat = self.args.temperature
        drawn = {"do_sample": True, "temperature": heat} if heat else {}
        answer = self.talk.ask(text, self.args.max_new_tokens, timer, stop, **drawn)
        self.view.end()
        return answer

    def _failed(self, error: BaseException, stop: Any) -> None:
        """An answer that came to no end: go on where it was asked for, else say what is wrong."""
        interrupted = isinstance(error, KeyboardInterrupt)
        # What a stop cuts short may fail in any way: it also reaches the compiler that is running.
        if not interrupted and not (stop.asked and isinstance(error, Exception)):
            raise error
        lost = "" if self.talk.tokens else "; the conversation starts anew"
        self.screen.note(f"stopped before the answer was complete{lost}")

    def _note(self, text: str, answer: Answer, speed: dict[str, Any]) -> None:
        from skv_compile.chat import CONTEXT, STOPPED
        from skv_compile.commands.picture import clean, line

        look = self.view.seen
        assert look is not None
        if not self.terminal:
            self.screen.write(clean(answer.text))
        rate = speed["tokens_per_second"]
        self.screen.note(line(look, answer.new_tokens, len(answer.tokens), rate))
        if answer.finish == CONTEXT:
            self.screen.note(
                f"The answer was cut: the context of {self.talk.context:,} tokens is full. /reset "
                "forgets the conversation; --context N makes room for more."
            )
        elif answer.finish == STOPPED:
            self.screen.note("Stopped. The conversation goes on from here.")
        self.turns.append(
            {
                "user": text,
                "text": answer.text,
                "new_tokens": answer.new_tokens,
                "answer_tokens": len(answer.tokens),
                "finish": answer.finish,
                "cache": look.to_dict(),
                "speed": speed,
            }
        )
        if self.args.json:  # a chat that is killed leaves what it has
            command = shlex.join(["skv", *sys.argv[1:]])
            common.write_json(self.args.json, command, self._record())

    def _record(self) -> dict[str, Any]:
        import dataclasses

        model = self.talk.model
        return {
            "model": self.args.model,
            "device": common.device_name(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "context": self.talk.context,
            "config": dataclasses.asdict(self.talk.cache.config),
            "turns": self.turns,
            "refused": self.refused,
        }
