"""``python -m mixtral_jax.sample``: text from a checkpoint, on a mesh."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from mixtral_jax import cli
from mixtral_jax.decode.completion import Batch, Completion
from mixtral_jax.decode.generate import speculation_refused
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.errors import BAD_DATA, OK, USAGE, MixtralError
from mixtral_jax.interactive import interact
from mixtral_jax.language_model import EMBEDDED, LanguageModel, Message, load
from mixtral_jax.load_options import LoadOptions
from mixtral_jax.sharding import hosts
from mixtral_jax.sharding.cluster import ProcessOptions
from mixtral_jax.terminal import expert_load, note


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Samples from a Mixtral checkpoint.

    CHECKPOINT is a folder that convert wrote, a Hugging Face folder, or 'tiny', the embedded model.
    """

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[CHECKPOINT]")] = (
        EMBEDDED
    )
    """A checkpoint folder, 'tiny', or org/name[@revision] on the Hugging Face Hub."""
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
    show_experts: bool = False
    """Draw how the tokens of prompts and answers were spread over the experts of each layer."""
    json: bool = False
    """Print one JSON line per sample on stdout and nothing else there; "dropped" and "stats" in
    each are those of the whole batch."""
    debug: bool = False
    """Show tracebacks."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = dataclasses.field(
        default_factory=SamplingOptions
    )
    load: tyro.conf.OmitArgPrefixes[LoadOptions] = dataclasses.field(default_factory=LoadOptions)
    processes: tyro.conf.OmitArgPrefixes[ProcessOptions] = dataclasses.field(
        default_factory=ProcessOptions
    )


def main(options: Options) -> int:
    """Loads, samples and prints."""
    _check(options)
    if hosts.join(options.processes, options) and options.interactive:
        raise MixtralError("--interactive is for one process", code=USAGE)
    lm = _load(options)
    if options.interactive:
        return interact(lm, options.sampling, system=options.system)
    batch = _batch(lm, options)
    completions = lm.complete(batch)
    code = BAD_DATA if any(completion.error for completion in completions) else OK
    if not hosts.is_first():
        return code
    for completion in completions:
        if completion.error:
            print(f"error: {completion.error}", file=sys.stderr)
        _show(completion, options, is_only_prompt=len(options.prompt) <= 1)
    if completions and not options.json:
        note(_summary(completions))
    if options.show_experts and batch.progress.expert_counts is not None:
        print(expert_load(batch.progress.expert_counts.sum(axis=0)), end="", file=sys.stderr)
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
    if options.load.offload is not None and options.sampling.speculate is not None:
        raise speculation_refused()
    if options.system is not None and not (options.chat or options.interactive):
        raise MixtralError("--system needs --chat", code=USAGE)
    if options.prompt_ids is not None and options.chat:
        raise MixtralError(
            "--chat needs text; with --prompt-ids the ids are used as they are", code=USAGE
        )
    if options.interactive and (options.json or options.show_experts):
        raise MixtralError(
            "--interactive prints text, and neither --json nor --show-experts", code=USAGE
        )


def _load(options: Options) -> LanguageModel:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn())
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not (console.is_terminal and hosts.is_first()),
    ) as bar:
        task = bar.add_task("load", total=None)
        return load(
            options.checkpoint,
            note=note,
            progress=lambda num_bytes: bar.advance(task, num_bytes),
            **dataclasses.asdict(options.load),
        )


def _batch(lm: LanguageModel, options: Options) -> Batch:
    if options.prompt_ids is not None:
        return lm.batch([_parse_ids(options.prompt_ids)], options.sampling)
    if options.chat:
        ids = [lm.encode_chat(_conversation(text, options.system)) for text in options.prompt]
    else:
        ids = [lm.encode(text) for text in options.prompt]
    return lm.batch(ids, options.sampling, prompts=options.prompt, is_answer=options.chat)


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise MixtralError("--prompt-ids", expected="1,2,3", got=repr(text), code=USAGE) from None


def _conversation(prompt: str, system: str | None) -> list[Message]:
    user = {"role": "user", "content": prompt}
    return [user] if system is None else [{"role": "system", "content": system}, user]


def _show(completion: Completion, options: Options, *, is_only_prompt: bool) -> None:
    if options.json:
        line = dataclasses.asdict(completion)
        if line["stats"]["speculated"] is None:
            del line["stats"]["speculated"]
        print(json.dumps(line), flush=True)
        return
    text = completion.generated_text
    if text is None:
        text = ",".join(map(str, completion.token_ids))
    elif completion.prompt is not None and not options.chat:
        text = completion.prompt + text
    elif not is_only_prompt:
        print(f"> {completion.prompt}", file=sys.stderr, flush=True)
    print(text, flush=True)


def _summary(completions: list[Completion]) -> str:
    stats = completions[0].stats
    tokens = sum(len(completion.token_ids) for completion in completions)
    ends = [c.finish_reason for c in completions if c.finish_reason]
    reasons = ", ".join(f"{ends.count(reason)} {reason}" for reason in dict.fromkeys(ends))
    reasons = ends[0] if len(completions) == len(ends) == 1 else reasons
    drafts = ""
    if stats.speculated is not None:
        drafts = f", {stats.speculated.accepted} of {stats.speculated.drafted} drafted tokens taken"
        drafts += " (switched off)" if stats.speculated.switched_off else ""
    return (
        f"{tokens} tokens, {reasons or 'no end'}: {stats.decode_tokens_per_second:.1f} tokens/s, "
        f"prefill {stats.prefill_seconds:.2f} s, compile {stats.compile_seconds:.1f} s{drafts}"
    )


def run(argv: Sequence[str]) -> int:
    """The command with these arguments; gives its exit code."""
    return cli.run_verb("sample", main, Options, argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
