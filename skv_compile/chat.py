"""A conversation whose turns share one spherical cache: only what is new goes through the model."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .cache.spherical import SphericalCache
from .config import Config
from .errors import SkvError

#: Why an answer ended.
END, LENGTH, CONTEXT, STOPPED = "end", "length", "context", "stopped"


class ChatError(SkvError):
    """A message that this conversation cannot take; it is as it was before."""


class Stop(StoppingCriteria):
    """Ends an answer after the token in progress, once ``asked`` is set."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """[B] bool: whether a row is done."""
        shape = input_ids.shape[:1]
        return torch.full(shape, self.asked, dtype=torch.bool, device=input_ids.device)

    @contextlib.contextmanager
    def on_interrupt(self) -> Iterator[None]:
        """Ctrl-C inside asks for the stop; a second one interrupts at once.

        Signals reach the main thread alone: in another one this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        before = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class _Heard(BaseStreamer):
    """Remembers every token of a ``generate``, prompt first, and passes it on."""

    def __init__(self, then: Any) -> None:
        self.tokens: list[int] = []
        self._then = then

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()
        if self._then is not None:
            self._then.put(value)

    def end(self) -> None:
        if self._then is not None:
            self._then.end()


@dataclasses.dataclass(frozen=True)
class Answer:
    """One turn. ``new_tokens`` went into the cache for the message, ``tokens`` are the answer's.

    ``finish``: END, the model ended it; LENGTH, as many tokens as were asked for; CONTEXT, the
    cache is full; STOPPED.
    """

    text: str
    new_tokens: int
    tokens: list[int]
    finish: str


class Conversation:
    """Turns between a user and a model that went through ``skv.compile``.

    ``tokens`` are in the cache; ``pending`` have been said and go in with the next message: the
    last token of an answer has not been through the model.

    Args:
        model, tokenizer: of the same vocabulary. Without a chat template, messages are fed as
            they are, a line each.
        context: tokens that the cache holds.
        config: of the cache.
        system: the system prompt.

    Raises:
        ChatError: a system prompt, and no template to say it with.
    """

    def __init__(
        self, model: Any, tokenizer: Any, context: int, config: Config, system: str | None = None
    ) -> None:
        if system is not None and not tokenizer.chat_template:
            raise ChatError(
                "the tokenizer of this model has no chat template, so a system prompt has no place "
                "in it. Leave the system prompt out, or take a model that was tuned for chat."
            )
        self.model, self.tokenizer, self.context = model, tokenizer, context
        self.cache = SphericalCache(model.config, context, config)
        self.system = system
        self.tokens: list[int] = []
        self.pending: list[int] = []
        self.messages: list[dict[str, str]] = []
        self._forget()

    def _forget(self) -> None:
        self.tokens, self.pending = [], []
        self.messages = [] if self.system is None else [self._said("system", self.system)]

    def reset(self) -> None:
        """Forget every turn; memory and compiled graphs stay."""
        self.cache.reset()
        self._forget()

    # ------------------------------------------------------------ words to tokens

    @staticmethod
    def _said(role: str, text: str) -> dict[str, str]:
        return {"role": role, "content": text}

    def encode(self, text: str) -> list[int]:
        """The tokens that a message adds to the cache, what is pending included.

        After the first turn that is what the template puts between an answer and the next one:
        answers stay in the cache as the model gave them, whatever the template would make of them.

        Raises:
            ChatError: the template refuses the conversation, or leaves earlier answers out.
        """
        if not self.tokenizer.chat_template:
            ids = self._plain(text if not self.tokens else f"\n{text}\n")
            return [*self.pending, *ids]
        said = [*self.messages, self._said("user", text)]
        if not self.tokens:
            return self._plain(self._rendered(said))
        mark = uuid.uuid4().hex  # stands for the last answer
        last = max(n for n, x in enumerate(said) if x["role"] == "assistant")
        said[last] = self._said("assistant", mark)
        _, found, after = self._rendered(said).rpartition(mark)
        if not found:
            raise ChatError(
                "the chat template of this model does not show earlier answers, so a conversation "
                "cannot go on from the cache. /reset before each message."
            )
        return [*self.pending, *self._plain(after)]

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise ChatError(f"the chat template refuses this conversation: {error}") from error

    def _plain(self, text: str) -> list[int]:
        special = not self.tokens and not self.tokenizer.chat_template
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    # ------------------------------------------------------------ turns

    def ask(
        self,
        text: str,
        most: int = 512,
        streamer: Any = None,
        stop: Stop | None = None,
        **sampling: Any,
    ) -> Answer:
        """Say ``text`` and let the model answer with at most ``most`` tokens.

        Args:
            streamer: gets the tokens as ``generate`` gives them, those in the cache first.
            stop: ends the answer early.
            sampling: more arguments of ``generate``; greedy without them.

        Raises:
            ChatError: the message does not fit the context, or the template.
        Any error leaves what reached the cache in the conversation; where the cache itself was
        damaged, the conversation starts anew.
        """
        stop, new = stop or Stop(), self.encode(text)
        begin = len(self.tokens)
        room = self.context - begin - len(new)
        if room < 1:
            raise ChatError(
                f"the context of {self.context:,} tokens is full: {begin:,} are in the cache and "
                f"this message brings {len(new):,}. Type /reset to forget the conversation, or "
                "start again with a larger --context."
            )
        heard = _Heard(streamer)
        ids = torch.tensor([self.tokens + new], device=self.model.device)
        try:
            with torch.no_grad():
                self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=self.cache,
                    max_new_tokens=min(most, room),
                    pad_token_id=self._pad,
                    streamer=heard,
                    stopping_criteria=StoppingCriteriaList([stop]),
                    **({"do_sample": False} | sampling),
                )
        except BaseException:
            self._recover(begin, len(new), text, heard.tokens)
            raise
        answer = heard.tokens[begin + len(new) :]
        finish = END if answer[-1] in self._ends else LENGTH
        if finish == LENGTH and stop.asked:
            finish = STOPPED
        elif finish == LENGTH and len(answer) == room < most:
            finish = CONTEXT
        said = self._commit(text, heard.tokens, answer)
        return Answer(said, len(new), answer, finish)

    @property
    def _ends(self) -> set[int]:
        found = self.model.generation_config.eos_token_id
        many = found if isinstance(found, (list, tuple)) else [found]
        return {x for x in (*many, self.tokenizer.eos_token_id) if x is not None}

    @property
    def _pad(self) -> int:
        found = (self.model.generation_config.pad_token_id, *sorted(self._ends), 0)
        return next(x for x in found if x is not None)

    def _commit(self, text: str, tokens: list[int], answer: list[int]) -> str:
        """Take a turn into the conversation; returns the answer's text."""
        seen = int(self.cache.get_seq_length())
        self.tokens, self.pending = tokens[:seen], tokens[seen:]
        if self.pending and self.pending[-1] in self._ends and self.tokenizer.chat_template:
            self.pending.pop()  # the template says it itself
        said = self.tokenizer.decode(answer, skip_special_tokens=True)
        self.messages += [self._said("user", text), self._said("assistant", said)]
        return said

    def _recover(self, begin: int, new: int, text: str, tokens: list[int]) -> None:
        """After an error: keep what the cache holds, or start anew where it is damaged."""
        seen = -1
        with contextlib.suppress(SkvError):
            self.cache.raise_flags()
            if not self.cache.journal.spoiled:
                seen = int(self.cache.get_seq_length())
        if seen == begin:
            return
        if begin + new <= seen <= len(tokens):
            self._commit(text, tokens, tokens[begin + new :])
        else:
            self.reset()
