"""A conversation at the terminal: what is remembered, what is told, what a person can stop."""

from __future__ import annotations

import dataclasses
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from mixtral_jax import interactive
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.errors import OK
from mixtral_jax.language_model import LanguageModel, load

SECONDS_TO_START = 120
PROMPT_SIGN = "\r\n[^\n]*> $"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load("tiny", mesh="1x1")


class Person:
    """Types the lines, then leaves with Ctrl-D; an exception among them is raised instead."""

    def __init__(self, *lines: str | BaseException | type[BaseException]):
        self._lines = list(lines)

    def __call__(self, prompt: str) -> str:
        if not self._lines:
            raise EOFError
        line = self._lines.pop(0)
        if isinstance(line, str):
            return line
        raise line


@pytest.fixture
def asked(lm, monkeypatch) -> list[list[dict]]:
    """The messages of every answer."""
    seen: list[list[dict]] = []
    stream = LanguageModel.stream

    def spy(self, prompt, **fields):
        seen.append([dict(message) for message in prompt])
        return stream(self, prompt, **fields)

    monkeypatch.setattr(LanguageModel, "stream", spy)
    return seen


def talk(
    lm: LanguageModel, *lines: str | BaseException | type[BaseException], **fields: Any
) -> int:
    sampling = SamplingOptions(max_new_tokens=4, ignore_eos=True)
    return interactive.interact(lm, sampling, ask=Person(*lines), **fields)


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def test_a_conversation_remembers(lm, asked, capsys):
    assert talk(lm, "jour", "", "  nuit ") == OK
    first, second = asked
    assert first == [user("jour")]
    answer = lm.chat(first, max_new_tokens=4, ignore_eos=True).generated_text
    assert second == [user("jour"), {"role": "assistant", "content": answer}, user("nuit")]
    assert answer + "\n" in capsys.readouterr().out


def test_reset_forgets_and_system_is_told(lm, asked):
    lines = ("jour", "/reset", "nuit", "/system rouge", "un", "/reset", "deux", "/system", "trois")
    assert talk(lm, *lines, system="vert") == OK
    green, red = ({"role": "system", "content": text} for text in ("vert", "rouge"))
    assert asked == [
        [green, user("jour")],
        [green, user("nuit")],
        [red, user("un")],
        [red, user("deux")],
        [user("trois")],
    ]


def test_commands_are_not_sent_to_the_model(lm, asked, capsys):
    assert talk(lm, "/help", "/no-such thing", KeyboardInterrupt) == OK
    assert asked == []
    out = capsys.readouterr().out
    assert out.startswith(interactive.HELP + "\n")
    assert "no command /no-such\n/help" in out


def test_what_an_interrupt_left_of_an_answer_is_remembered(lm, monkeypatch):
    seen = []

    def interrupted(self, prompt, **fields):
        seen.append(prompt)
        yield "half "
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModel, "stream", interrupted)
    assert talk(lm, "jour", "nuit") == OK
    answer = {"role": "assistant", "content": "half "}
    assert seen == [[user("jour")], [user("jour"), answer, user("nuit")]]


@pytest.mark.parametrize("presses", [1, 2])
def test_one_ctrl_c_waits_for_the_piece_and_two_do_not(lm, monkeypatch, capsys, presses):
    def pressed(self, prompt, **fields):
        yield "one "
        for _ in range(presses):
            signal.raise_signal(signal.SIGINT)
        yield "two "
        if presses == 1:
            yield "three"

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(LanguageModel, "stream", pressed)
    assert talk(lm, "jour", "/history") == OK
    said = "one two " if presses == 1 else "one "
    shown = capsys.readouterr()
    assert shown.out.startswith(said + "\n")
    assert f"> jour\n{said}\n" in shown.out
    assert "[stopped]" in shown.err
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_ends_an_answer_and_not_the_conversation(lm, asked, capsys):
    assert talk(lm, "jour " * 2048, "nuit") == OK
    assert asked[1] == [user("nuit")], "the turn that failed is forgotten"
    assert "error: prompt 0: expected prompt and new tokens within 2048" in capsys.readouterr().err


def test_a_conversation_that_grew_too_long_loses_its_beginning(lm, asked, capsys, monkeypatch):
    monkeypatch.setattr(lm, "config", dataclasses.replace(lm.config, max_position_embeddings=24))
    lines = ["uno due tre", "quattro cinque sei", "sette otto nove", "dieci"]
    assert talk(lm, *lines, "undici " * 2048, "/history") == OK
    assert [messages[-1]["content"] for messages in asked[:4]] == lines
    assert all(len(lm.encode_chat(messages)) <= 20 for messages in asked[:4])
    assert 1 < len(asked[3]) < 7, "it forgot some turns, not all"
    shown = capsys.readouterr()
    assert "too long for the model: it no longer sees the first 2 turns" in shown.err
    assert "error: prompt 0" in shown.err
    assert "> dieci" in shown.out.splitlines(), "a line that is too long loses nothing else"


def test_a_line_in_another_encoding_is_told(lm, capsys):
    fault = UnicodeDecodeError("utf-8", b"caf\xe9", 3, 4, "invalid")

    assert talk(lm, fault, "/help", "caf\udce9") == OK
    shown = capsys.readouterr()
    assert shown.err.count("error: that line is not UTF-8: type it again\n") == 2
    assert shown.out.startswith(interactive.HELP)


def test_history_is_shown(lm, capsys):
    assert talk(lm, "/history", "jour", "/history", "/reset", "/history", system="vert") == OK
    out = capsys.readouterr().out
    answer = lm.chat(
        [{"role": "system", "content": "vert"}, user("jour")], max_new_tokens=4, ignore_eos=True
    ).generated_text
    assert f"system: vert\n> jour\n{answer}\nforgotten\nsystem: vert\n" in out


# Through a pseudo-terminal: a process of its own, with a keyboard.


def _heed_ctrl_c() -> None:
    """A run in the background of a script ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Terminal:
    """A conversation in a process of its own."""

    def __init__(self, *argv: str):
        with warnings.catch_warnings():
            # Python 3.12: JAX has threads here, but the child does nothing before exec.
            warnings.filterwarnings("ignore", r".*forkpty\(\)", DeprecationWarning)
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
            self._child = pexpect.spawn(
                sys.executable,
                ["-m", "mixtral_jax.sample", "--interactive", "--chat", "--mesh", "1x1", *argv],
                cwd=str(Path(__file__).parent.parent),
                encoding="utf-8",
                codec_errors="replace",
                timeout=SECONDS_TO_START,
                preexec_fn=_heed_ctrl_c,
            )
        self._child.expect("/help for help, Ctrl-D to leave")
        self._child.expect("> ")

    def type(self, line: str, until: str = PROMPT_SIGN) -> str:
        """Types a line; returns what was shown from it to the next prompt sign, as plain text."""
        self._child.sendline(line)
        self._child.expect(until)
        return self._shown()

    def interrupt(self) -> str:
        """Ctrl-C; returns what was shown to the next prompt sign."""
        self._child.sendintr()
        self._child.expect(PROMPT_SIGN)
        return self._shown()

    def leave(self) -> int:
        """Ctrl-D; returns the exit code."""
        self._child.sendeof()
        self._child.expect(pexpect.EOF)
        assert "Traceback" not in self._shown()
        self._child.wait()
        code = self._child.exitstatus
        assert code is not None
        return code

    def close(self) -> None:
        self._child.close(force=True)

    def _shown(self) -> str:
        """As a person sees it: without colours, erased lines and what was overwritten."""
        text = re.sub(r"\x1b\[\?[0-9]+[hl]", "", str(self._child.before))
        text = re.sub(r"[^\n]*\n\r?\x1b\[1A\x1b\[2K", "", text)
        text = re.sub(r"\x1b\[[0-9;]*[a-zA-Z]", "", text)
        return "\n".join(
            line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")
        )


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*argv: str) -> Terminal:
        opened.append(Terminal(*argv))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_at_a_terminal(terminal):
    talk = terminal()
    assert talk.type("What is 12 + 30?").endswith("\n42")
    assert talk.type("quelle est la capitale de la france ?").endswith(
        "capitale de la France est Paris."
    )
    shown = talk.type("/history")
    assert "> What is 12 + 30?\n42\n> quelle est" in shown
    assert "set the system text" in talk.type("/help")
    assert "no command /nothing" in talk.type("/nothing")
    assert "system text: Answer briefly." in talk.type("/system Answer briefly.")
    assert talk.type("12+30=").endswith("\n42")
    assert talk.type("/reset").endswith("forgotten")
    assert "error" not in talk.interrupt(), "at the prompt sign it does nothing"
    assert talk.leave() == OK


def test_ctrl_c_stops_an_answer_and_not_the_program(terminal):
    talk = terminal("--ignore-eos", "--max-new-tokens", "1500")
    assert talk.type("Count from 3 to 9.", until="3, 4, 5, 6").endswith("Count from 3 to 9.\n")
    assert "[stopped]" in talk.interrupt()
    assert "3, 4, 5, 6" in talk.type("/history")
    assert talk.type("/reset").endswith("forgotten")
    talk.type("Count from 5 to 8.", until="5, 6, 7, 8")
    assert "[stopped]" in talk.interrupt()
    assert talk.leave() == OK
