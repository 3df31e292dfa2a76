"""A conversation over one cache, and ``skv chat`` where there is no terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support import TEMPLATE, saved, spelling_tokenizer, tiny

import skv_compile as skv
from skv_compile import cli
from skv_compile.chat import CONTEXT, END, LENGTH, STOPPED, ChatError, Conversation, Stop
from skv_compile.commands import chat as command
from skv_compile.commands.common import TokenTimer
from skv_compile.commands.live import View, Words
from skv_compile.commands.picture import clean
from skv_compile.integrations.hf import Attachment

SMALL = {"sinks": 4, "recent": 16, "bits": 2.5}
LONG = "a sphere has no edges, only directions; " * 4


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps run as they are, which takes no time to prepare; the terminal's test compiles them."""
    monkeypatch.setattr(Attachment, "compiled", lambda self, device: self._forward)


def conversation(context: int = 600, template: str | None = TEMPLATE, **kw: Any) -> Conversation:
    settings = SMALL | {k: kw.pop(k) for k in ("codec", "retention") if k in kw}
    model = skv.compile(tiny("llama"), **settings)
    config = skv.Config(**settings)
    return Conversation(model, spelling_tokenizer(template), context, config, **kw)


def codes(text: str) -> list[int]:
    return [ord(x) for x in text]


class Reference:
    """The same chunks through a cache of the same kind, by hand."""

    def __init__(self, talk: Conversation) -> None:
        self.model = talk.model
        self.cache = skv.SphericalCache(talk.model.config, talk.context, talk.cache.config)

    @torch.no_grad()
    def chunk(self, ids: list[int]) -> torch.Tensor:
        """Logits [n, V] of a forward."""
        return self.model(torch.tensor([ids]), past_key_values=self.cache).logits[0]

    def answer(self, ids: list[int], most: int) -> list[int]:
        """Greedy tokens after a chunk."""
        found = [int(self.chunk(ids)[-1].argmax())]
        while len(found) < most:
            found.append(int(self.chunk(found[-1:])[-1].argmax()))
        return found


@pytest.mark.parametrize(
    "how", [{"codec": "identity"}, {"retention": "rdr"}, {"codec": "grid", "retention": "none"}]
)
def test_later_turns_are_what_the_same_chunks_make(how: dict[str, Any]) -> None:
    talk = conversation(**how)
    twin = Reference(talk)
    one = talk.ask(LONG, most=90)
    assert one.finish == LENGTH
    assert one.tokens == twin.answer(codes(f"<U{LONG}><A"), 90)
    two = talk.ask("and you?", most=40)
    # The last token of an answer has not been through the model: it goes in with what follows it.
    assert two.tokens == twin.answer([one.tokens[-1], *codes("><Uand you?><A")], 40)
    assert two.new_tokens == 1 + len("><Uand you?><A")
    three = talk.ask("so?", most=3)
    assert three.tokens == twin.answer([two.tokens[-1], *codes("><Uso?><A")], 3)
    ids = three.tokens[-1:]
    with torch.no_grad():
        got = talk.model(torch.tensor([ids]), past_key_values=talk.cache).logits[0]
    assert torch.equal(got, twin.chunk(ids))
    assert talk.cache.resident_bytes == twin.cache.resident_bytes


def test_what_is_in_the_cache_is_known() -> None:
    talk = conversation(system="be brief")
    answer = talk.ask("hello", most=20)
    assert talk.tokens == [*codes("<Sbe brief><Uhello><A"), *answer.tokens[:-1]]
    assert talk.pending == answer.tokens[-1:]
    assert len(talk.tokens) == int(talk.cache.get_seq_length())
    assert [x["role"] for x in talk.messages] == ["system", "user", "assistant"]
    talk.reset()
    assert (talk.tokens, talk.pending, int(talk.cache.get_seq_length())) == ([], [], 0)
    assert talk.ask("hello", most=20).tokens == answer.tokens


def test_an_answer_that_the_model_ends_is_closed_by_the_template() -> None:
    first = conversation().ask("hello", most=30).tokens
    end = first[10]
    length = first.index(end) + 1
    talk = conversation()
    talk.model.generation_config.eos_token_id = end
    answer = talk.ask("hello", most=30)
    assert (answer.finish, answer.tokens) == (END, first[:length])
    assert talk.pending == []
    assert talk.encode("next") == codes("><Unext><A")
    assert talk.ask("next", most=5).new_tokens == len("><Unext><A")


def test_without_a_template_lines_go_in_as_they_are() -> None:
    talk = conversation(template=None)
    answer = talk.ask("one", most=10)
    assert talk.tokens[:3] == codes("one")
    assert talk.encode("two") == [answer.tokens[-1], *codes("\ntwo\n")]
    with pytest.raises(ChatError, match="no chat template"):
        conversation(template=None, system="be brief")


def test_a_full_context_is_said_and_changes_nothing() -> None:
    talk = conversation(context=60)
    answer = talk.ask("hello", most=500)
    assert answer.finish == CONTEXT
    assert len(talk.tokens) + len(talk.pending) == 60
    before = (list(talk.tokens), list(talk.messages), talk.cache.summary())
    with pytest.raises(ChatError, match=r"context of 60 .*/reset .*--context"):
        talk.ask("more")
    assert before == (talk.tokens, talk.messages, talk.cache.summary())
    talk.reset()
    assert talk.ask("hello", most=500).tokens == answer.tokens


class Breaks(Words):
    """Raises when the n-th token comes."""

    def __init__(self, after: int, error: BaseException) -> None:
        super().__init__(spelling_tokenizer())
        self.left, self.error = after + 1, error

    def put(self, value: Any) -> None:
        super().put(value)
        self.left -= 1
        if self.left == 0:
            raise self.error


def test_a_stop_ends_the_answer_and_the_chat_goes_on() -> None:
    talk, stop = conversation(), Stop()

    class Asks(Words):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            stop.asked |= len(talk.cache.layers) > 0 and int(talk.cache.get_seq_length()) > 30

    answer = talk.ask("hello", 200, Asks(talk.tokenizer), stop)
    assert answer.finish == STOPPED
    assert 10 < len(answer.tokens) < 40
    twin = Reference(talk)
    twin.answer(codes("<Uhello><A"), len(answer.tokens))
    want = twin.answer([answer.tokens[-1], *codes("><Uand?><A")], 9)
    assert talk.ask("and?", most=9).tokens == want


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken")])
def test_an_error_in_an_answer_leaves_what_the_cache_holds(error: BaseException) -> None:
    talk = conversation()
    with pytest.raises(type(error)):
        talk.ask("hello", 50, Breaks(7, error))
    assert len(talk.tokens) == int(talk.cache.get_seq_length()) == len("<Uhello><A") + 6
    assert len(talk.pending) == 1
    assert talk.messages[-1]["role"] == "assistant"
    twin = Reference(talk)
    begun = twin.answer(codes("<Uhello><A"), 7)
    assert talk.ask("and?", most=9).tokens == twin.answer([begun[-1], *codes("><Uand?><A")], 9)


def test_an_error_in_the_first_forward_leaves_the_conversation_as_it_was() -> None:
    talk = conversation()
    talk.ask("hello", most=5)
    before = (list(talk.tokens), list(talk.pending), list(talk.messages))

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = talk.model.model.layers[1].register_forward_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        talk.ask("and?", most=5)
    hook.remove()
    assert before == (talk.tokens, talk.pending, talk.messages)
    other = conversation()
    other.ask("hello", most=5)
    assert talk.ask("and?", most=5).tokens == other.ask("and?", most=5).tokens


def test_templates_that_cannot_go_on_are_refused() -> None:
    hides = "{{ '<U' + messages[-1]['content'] + '><A' }}"
    talk = conversation(template=hides)
    talk.ask("hello", most=3)
    with pytest.raises(ChatError, match="does not show earlier answers"):
        talk.ask("more")
    raises = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ChatError, match="roles must alternate"):
        conversation(template=raises).ask("hello")


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model") / "tiny", tiny("llama"), TEMPLATE)


def chatted(
    monkeypatch: pytest.MonkeyPatch, folder: str, lines: str, file: Path, *more: str
) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of a chat whose input is a pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    sizes = ["--context", "300", "--max-new-tokens", "40", "--bits", "2.5"]
    code = cli.main(["chat", folder, *sizes, "--json", str(file), *more])
    return code, json.loads(file.read_text(encoding="utf-8"))


def test_lines_of_a_pipe_are_answered_without_escape_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: str,
    tmp_path: Path,
) -> None:
    lines = f"{LONG}\n\n/cache\nwhat?\n/help\n/reset\n//usr is what?\n/quit\nnever said\n"
    code, found = chatted(monkeypatch, folder, lines, tmp_path / "a.json")
    said = capsys.readouterr()
    assert code == 0
    assert "\x1b" not in said.out + said.err
    assert [x["user"] for x in found["turns"]] == [LONG.strip(), "what?", "/usr is what?"]
    one, two, three = found["turns"]
    for turn in found["turns"]:
        assert clean(turn["text"]).strip() in said.out
        assert (turn["answer_tokens"], turn["finish"]) == (40, LENGTH)
        assert turn["speed"]["steps_counted"] > 0
        cache = turn["cache"]
        assert sum(cache["counts"].values()) == cache["tokens"] * cache["heads"]
        assert f"{cache['tokens']} of 300 in the cache" in said.err
    assert two["cache"]["tokens"] == one["cache"]["tokens"] + two["new_tokens"] + 39
    assert three["cache"]["tokens"] == len("<U/usr is what?><A") + 39
    assert one["cache"]["counts"]["dropped"] > 0
    assert said.out.count("bands of layers") == 1  # only /cache draws
    assert f"{one['cache']['resident_bytes']:,} bytes" in said.out
    assert "/reset" in said.err


def test_a_pipe_hears_of_what_was_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: str,
    tmp_path: Path,
) -> None:
    lines = f"hello\n{LONG * 2}\n/nothing\n/reset\nhello\n"
    code, found = chatted(monkeypatch, folder, lines, tmp_path / "a.json")
    said = capsys.readouterr().err
    assert (code, found["refused"]) == (2, 2)
    assert "context of 300 tokens is full" in said
    assert "no command /nothing" in said
    assert [x["user"] for x in found["turns"]] == ["hello", "hello"]
    assert found["turns"][0]["text"] == found["turns"][1]["text"]


def test_an_answer_that_fills_the_context_says_so(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: str,
    tmp_path: Path,
) -> None:
    more = ("--context", "32", "--temperature", "0.9", "--seed", "3")
    code, found = chatted(monkeypatch, folder, "hello\n", tmp_path / "a.json", *more)
    assert (code, found["turns"][0]["finish"]) == (0, CONTEXT)
    assert "context of 32 tokens is full" in capsys.readouterr().err
    texts = {found["turns"][0]["text"]}
    for seed in ("3", "4"):
        more = (*more[:-1], seed)
        texts.add(
            chatted(monkeypatch, folder, "hello\n", tmp_path / "a.json", *more)[1]["turns"][0][
                "text"
            ]
        )
    assert len(texts) == 2  # the same seed twice, and another


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--context", "5000"], "made for at most 4096"),
        (["--temperature", "-1"], "--temperature"),
        (["--retention", "snapk"], "snapkv"),
        (["--frame", "no/such/file"], "no/such/file"),
    ],
)
def test_settings_are_refused(
    folder: str, capsys: pytest.CaptureFixture[str], more: list[str], word: str
) -> None:
    assert cli.main(["chat", folder, *more]) == 2
    assert word in capsys.readouterr().err


# ---------------------------------------------------------------- what is drawn


def test_the_answer_stands_beside_the_picture_and_its_end_is_what_fits() -> None:
    talk = conversation()
    console = Console(width=100, height=24, force_terminal=True, color_system=None)
    view, words = View(console, talk.cache), Words(talk.tokenizer)
    timer = TokenTimer(each=view.tick, then=words)
    view.begin(words, timer, Stop(), compiles=True)

    def shown() -> list[str]:
        with console.capture() as capture:
            console.print(view._draw())
        return capture.get().splitlines()

    assert "reading" in shown()[0]
    talk.ask("hello", 30, timer)
    words.text = " ".join(f"word{n}" for n in range(400))
    assert len(shown()) < 24
    assert any("word399" in row and "layer" not in row for row in shown())
    assert not any("word0 " in row for row in shown())
    view.end()
    whole = shown()
    assert len(whole) > 24
    assert "word0 " in whole[0]
    assert f"{talk.cache.resident_bytes:,} bytes" in whole[0]
    console.width = 70  # too narrow for both: one above the other
    assert "bytes" not in shown()[0]
    assert any(f"{talk.cache.resident_bytes:,} bytes" in row for row in shown())


def test_time_spent_beside_the_model_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def draw() -> None:
        now[0] += 100.0

    timer = TokenTimer(each=draw)
    for _ in range(6):
        timer.put(None)
        now[0] += 0.5
    speed = timer.speed(left_out=1)
    assert (speed["tokens_per_second"], speed["steps_counted"]) == (2.0, 3)


def test_the_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["chat", "--help"])
    said = capsys.readouterr().out
    for word in ("--system", "--context", str(command.CONTEXT), "--budget", "--json"):
        assert word in said
