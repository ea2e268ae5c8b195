"""A conversation at the terminal: ``python -m mixtral_jax.sample --interactive --chat``."""

from __future__ import annotations

import contextlib
import sys
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
            line = ask("> ").strip()
        except EOFError:
            print()
            return OK
        except KeyboardInterrupt:
            print()
            continue
        if line.startswith("/"):
            print(talk.command(line))
        elif line:
            talk.answer(line)


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
            said = [marks[m["role"]] + m["content"] for m in self._messages()]
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
        self._turns.append({"role": "user", "content": line})
        pieces: list[str] = []
        try:
            self._make_room()
            for piece in _waiting(self._lm.stream(self._messages(), options=self._sampling)):
                print(piece, end="", flush=True)
                pieces.append(piece)
        except KeyboardInterrupt:
            print(" [stopped]", file=sys.stderr, end="")
        except MixtralError as error:
            print(f"error: {error}", file=sys.stderr)
            self._turns.pop()
            return
        print(flush=True)
        if pieces:
            self._turns.append({"role": "assistant", "content": "".join(pieces)})
        else:  # the chat format has no empty turn
            self._turns.pop()

    def _messages(self) -> list[Message]:
        system: list[Message] = []
        if self._system is not None:
            system = [{"role": "system", "content": self._system}]
        return [*system, *self._turns]

    def _make_room(self) -> None:
        """Forgets the earliest turns of a conversation that the model cannot hold, and says so."""
        longest = self._lm.config.max_position_embeddings - self._sampling.max_new_tokens
        forgotten = 0
        while len(self._turns) > 1 and len(self._lm.encode_chat(self._messages())) > longest:
            del self._turns[:2]
            forgotten += 2
        if forgotten:
            note(f"the conversation is too long for the model: forgot its first {forgotten} turns")


def _waiting(pieces: Iterator[str]) -> Iterator[str]:
    """The same pieces; until the first one comes a terminal shows that something happens."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield from pieces
        return
    with console.status("reading"):
        first = next(pieces, None)
    if first is not None:
        yield first
        yield from pieces
