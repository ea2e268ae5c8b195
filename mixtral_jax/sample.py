"""``python -m mixtral_jax.sample``: text from a checkpoint, on a mesh."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Annotated

import tyro

from mixtral_jax import cli
from mixtral_jax.decode.completion import Completion
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.errors import BAD_DATA, OK, USAGE, MixtralError
from mixtral_jax.language_model import EMBEDDED, LanguageModel, LoadOptions, Message, load

HELP = "/help  this list    /reset  forget the conversation    /system TEXT  set the system text"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Samples from a Mixtral checkpoint.

    CHECKPOINT is a folder that convert wrote, a Hugging Face folder, or 'tiny', the embedded model.
    """

    checkpoint: tyro.conf.Positional[str] = EMBEDDED
    """A checkpoint folder, or 'tiny'."""
    prompt: tuple[str, ...] = ()
    """A text to continue, or with --chat the user's turn of a conversation of its own; repeat it
    for a batch."""
    chat: bool = False
    """Ask in the model's own chat format."""
    system: str | None = None
    """System text of each conversation (with --chat)."""
    prompt_ids: str | None = None
    """Token ids instead of text: 1,2,3."""
    interactive: bool = False
    """Talk to the model; streams its answers."""
    json: bool = False
    """Print one JSON line per sample on stdout and nothing else there."""
    debug: bool = False
    """Show tracebacks."""
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=SamplingOptions
    )
    load: Annotated[LoadOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=LoadOptions
    )


def note(line: str) -> None:
    """One line for the person at the terminal; stdout is for the text."""
    print(f"note: {line}", file=sys.stderr, flush=True)


def main(options: Options) -> int:
    """Loads, samples and prints."""
    _check(options)
    lm = _load(options)
    if options.interactive:
        return interact(lm, options)
    code = OK
    for completion in _completions(lm, options):
        if completion.error:
            print(f"error: {completion.error}", file=sys.stderr)
            code = BAD_DATA
        _show(completion, options)
    return code


def _check(options: Options) -> None:
    asked = bool(options.prompt) + (options.prompt_ids is not None) + options.interactive
    if asked != 1:
        raise MixtralError(
            "what to sample",
            expected="one of --prompt, --prompt-ids and --interactive",
            got=f"{asked} of them",
            fix='--prompt "Hello"',
            code=USAGE,
        )
    if options.system is not None and not (options.chat or options.interactive):
        raise MixtralError("--system needs --chat", code=USAGE)
    if options.prompt_ids is not None and options.chat:
        raise MixtralError(
            "--chat needs text; with --prompt-ids the ids are used as they are", code=USAGE
        )
    if options.interactive and options.json:
        raise MixtralError("--interactive prints text, not --json", code=USAGE)


def _load(options: Options) -> LanguageModel:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("load", total=None)
        return load(
            options.checkpoint,
            note=note,
            progress=lambda num_bytes: bar.advance(task, num_bytes),
            **dataclasses.asdict(options.load),
        )


def _completions(lm: LanguageModel, options: Options) -> list[Completion]:
    if options.prompt_ids is not None:
        ids = _parse_ids(options.prompt_ids)
        return lm.generate(prompt_token_ids=[ids], options=options.sampling)
    if not options.chat:
        return lm.generate(options.prompt, options=options.sampling)
    conversations = [_conversation(prompt, options.system) for prompt in options.prompt]
    ids = [lm.encode_chat(messages) for messages in conversations]
    batch = lm.batch(ids, options.sampling, prompts=options.prompt, is_answer=True)
    return lm.complete(batch)


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise MixtralError("--prompt-ids", expected="1,2,3", got=repr(text), code=USAGE) from None


def _conversation(prompt: str, system: str | None) -> list[Message]:
    user = {"role": "user", "content": prompt}
    return [user] if system is None else [{"role": "system", "content": system}, user]


def _show(completion: Completion, options: Options) -> None:
    if options.json:
        print(json.dumps(dataclasses.asdict(completion)), flush=True)
        return
    text = completion.generated_text
    if text is None:
        text = ",".join(map(str, completion.token_ids))
    elif completion.prompt is not None and not options.chat:
        text = completion.prompt + text
    print(text, flush=True)
    stats = completion.stats
    note(
        f"{len(completion.token_ids)} tokens, {completion.finish_reason}; batch: "
        f"{stats.decode_tokens_per_second:.1f} tokens/s, prefill {stats.prefill_seconds:.2f} s, "
        f"compile {stats.compile_seconds:.1f} s"
    )


def interact(lm: LanguageModel, options: Options, *, ask: Callable[[str], str] = input) -> int:
    """A conversation at the terminal. Ctrl-C stops an answer, Ctrl-D ends the program."""
    system = options.system
    messages: list[Message] = []
    note(f"/help for help, Ctrl-D to leave; {lm.config.num_local_experts} experts on {lm.spec}")
    while True:
        try:
            line = ask("> ").strip()
        except EOFError:
            print()
            return OK
        except KeyboardInterrupt:
            print()
            continue
        command, _, rest = line.partition(" ")
        if not line:
            continue
        if command == "/help":
            print(HELP)
        elif command in ("/reset", "/system"):
            messages = []
            system = rest or None if command == "/system" else system
        elif line.startswith("/"):
            print(f"no command {command}; {HELP}")
        else:
            turn: Message = {"role": "user", "content": line}
            first = [] if system is None else [{"role": "system", "content": system}]
            answer = _answer(lm, [*first, *messages, turn], options.sampling)
            if answer:  # the chat format has no empty turn
                messages += [turn, {"role": "assistant", "content": answer}]


def _answer(lm: LanguageModel, messages: list[Message], sampling: SamplingOptions) -> str | None:
    """Streams an answer; what Ctrl-C left of it counts, None where nothing can be remembered."""
    pieces = []
    try:
        for piece in lm.stream(messages, options=sampling):
            print(piece, end="", flush=True)
            pieces.append(piece)
    except KeyboardInterrupt:
        pass
    except MixtralError as error:
        print(f"error: {error}", file=sys.stderr)
        return None
    print()
    return "".join(pieces)


if __name__ == "__main__":
    sys.exit(cli.run(main, Options, "python -m mixtral_jax.sample"))
