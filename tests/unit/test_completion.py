"""The scripts of ``skv completion``, run by the shell they are for where it is installed."""

from __future__ import annotations

import builtins
import shutil
import subprocess
from typing import Any

import pytest

from skv_compile import cli
from skv_compile.commands import COMMANDS, completion

pytest.importorskip("shtab")

ASK = """
source "$1"; shift
COMP_WORDS=(skv "$@"); COMP_CWORD=$#; COMP_LINE="skv $*"; COMP_POINT=${#COMP_LINE}
found=$(complete -p skv | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
$found skv "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What bash offers for the last of some words."""
    if not shutil.which("bash"):
        pytest.skip("no bash here")
    folder = tmp_path_factory.mktemp("bash")
    (folder / "skv.bash").write_text(completion.script("bash"), encoding="utf-8")
    (folder / "some.gguf").touch()

    def offer(*words: str) -> set[str]:
        done = subprocess.run(
            ["bash", "--norc", "-c", ASK, "bash", "skv.bash", *words],
            cwd=folder,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split())

    return offer


def test_bash_completes_commands(bash: Any) -> None:
    assert set(COMMANDS) <= bash("")
    assert bash("ch") == {"chat"}


def test_bash_completes_options_and_their_values(bash: Any) -> None:
    assert bash("generate", "--max") == {"--max-new-tokens"}
    assert {"--bits", "--retention", "--budget", "--json"} <= bash("chat", "--")
    assert bash("chat", "--retention", "s") == {"snapkv", "streaming"}
    assert {"frame", "identity"} <= bash("eval", "--codec", "")
    assert bash("completion", "f") == {"fish"}
    assert bash("bench", "--device", "") == {"cuda", "cpu"}


def test_bash_completes_files(bash: Any) -> None:
    assert "some.gguf" in bash("demo", "--model", "so")
    assert "some.gguf" in bash("explain", "so")


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_shell_has_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for word in ("chat", "retention-map", "snapkv", "identity"):
        assert word in text
    if found := shutil.which(shell):
        done = subprocess.run([found, "-n", "/dev/stdin"], input=text, text=True)
        assert done.returncode == 0


def test_a_script_does_not_change_what_commands_take() -> None:
    completion.script("bash")
    args = cli.build_parser().parse_args(["chat", "--retention", "no-such-policy"])
    assert args.retention == "no-such-policy"  # Config refuses it, and says which there are


def test_a_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name == "shtab":
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main(["completion", "bash"]) == 2
    assert "pip install shtab" in capsys.readouterr().err


def test_other_shells_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["completion", "cmd"])
    assert stopped.value.code == 2
    assert "choose from" in capsys.readouterr().err
