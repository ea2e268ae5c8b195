"""A conversation at the terminal: ``python -m mixtral_jax.sample --interactive --chat``."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.errors import OK, MixtralError
from mixtral_jax.language_model import LanguageModel, Message
from mixtral_jax.terminal import note

HELP = """\
/help         this list
/history      the conversation so far
/reset        forget the conversation
/system TEXT  set the system text and begin anew; without TEXT there is none
Ctrl-C        stop an answer
Ctrl-D        leave"""


def interact(
    lm: LanguageModel,
    sampling: SamplingOptions,
    *,
    system: str | None = None,
    ask: Callable[[str], str] = input,
) -> int:
    """Asks for turns and streams the answers until Ctrl-D; returns the exit code.

    Args:
        lm: the model.
        sampling: options of every answer.
        system: system text of the conversation.
        ask: shows a prompt sign and returns the person's line.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and earlier lines, wherever there is one)
    note(f"/help for help, Ctrl-D to leave; {lm.config.num_local_experts} experts on {lm.spec}")
    talk = Conversation(lm, sampling, system)
    while True:
        try:
            try:
                line = ask("> ").strip()
                line.encode("utf-8")  # half of a character may arrive as a surrogate
            except UnicodeError:
                print("error: that line is not UTF-8: type it again", file=sys.stderr)
                continue
            if line.startswith("/"):
                print(talk.command(line))
            elif line:
                talk.answer(line)
        except EOFError:
            print()
            return OK
        except KeyboardInterrupt:
            print()


class Conversation:
    """What was said so far, and under which system text."""

    def __init__(self, lm: LanguageModel, sampling: SamplingOptions, system: str | None):
        self._lm, self._sampling, self._system = lm, sampling, system
        self._turns: list[Message] = []

    def command(self, line: str) -> str:
        """Obeys a line that starts with a slash; returns what to say."""
        name, _, text = line.partition(" ")
        if name == "/help":
            return HELP
        if name == "/history":
            marks = {"user": "> ", "assistant": "", "system": "system: "}
            said = [marks[m["role"]] + m["content"] for m in self._with_system(self._turns)]
            return "\n".join(said) or "nothing was said yet"
        if name == "/reset":
            self._turns = []
            return "forgotten"
        if name == "/system":
            self._turns, self._system = [], text.strip() or None
            return f"system text: {self._system or 'none'}; the conversation begins anew"
        return f"no command {name}\n{HELP}"

    def answer(self, line: str) -> None:
        """Streams an answer to the terminal. What Ctrl-C left of it is remembered."""
        pieces: list[str] = []
        turns = [*self._turns, {"role": "user", "content": line}]
        try:
            turns = self._shortened(turns)
            stream = self._lm.stream(self._with_system(turns), options=self._sampling)
            with _interruptible() as is_stopped:
                for piece in _waiting(stream):
                    print(piece, end="", flush=True)
                    pieces.append(piece)
                    if is_stopped():
                        break
                if is_stopped():  # perhaps after the last text
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            print(" [stopped]", file=sys.stderr, end="")
        except MixtralError as error:
            print(f"error: {error}", file=sys.stderr)
            return
        print(flush=True)
        if pieces:  # the chat format has no empty turn
            self._turns = [*turns, {"role": "assistant", "content": "".join(pieces)}]

    def _with_system(self, turns: list[Message]) -> list[Message]:
        if self._system is None:
            return turns
        return [{"role": "system", "content": self._system}, *turns]

    def _shortened(self, turns: list[Message]) -> list[Message]:
        """Without the first turns of a conversation that the model cannot hold, and says so."""
        longest = self._lm.config.max_position_embeddings - self._sampling.max_new_tokens
        for start in range(0, len(turns), 2):
            if len(self._lm.encode_chat(self._with_system(turns[start:]))) <= longest:
                if start:
                    note(f"too long for the model: it no longer sees the first {start} turns")
                return turns[start:]
        return turns  # not even the last: the model says so


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks for an end after this piece; a second one breaks off whatever is running.

    An exception in the middle of JAX could get lost in one of its callbacks.
    """
    asked: list[int] = []

    def ask(signum: int, frame: object) -> None:
        del frame
        asked.append(signum)
        if len(asked) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals are the main thread's
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def _waiting(pieces: Iterator[str]) -> Iterator[str]:
    """The same pieces; until the first one comes a terminal shows that something happens."""
    from rich.console import Console

    if not sys.stderr.isatty():
        yield from pieces
        return
    with Console(stderr=True).status("reading"):
        first = next(pieces, None)
    if first is not None:
        yield first
        yield from pieces
