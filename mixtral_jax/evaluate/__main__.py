"""``python -m mixtral_jax.evaluate perplexity|exact|routing|lm-eval``: what a model is worth."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, TypeAlias

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mixtral_jax import cli, terminal
from mixtral_jax.config import DTYPES, ModelConfig
from mixtral_jax.convert.hub import EMBEDDED
from mixtral_jax.convert.terminal import Stop
from mixtral_jax.errors import INPUT_NOT_FOUND, OK, USAGE, MixtralError
from mixtral_jax.evaluate import harness, report
from mixtral_jax.evaluate.exact import ask, read_questions, score_of
from mixtral_jax.evaluate.options import (
    ExactOptions,
    HarnessOptions,
    PerplexityOptions,
    RoutingOptions,
    Shared,
)
from mixtral_jax.evaluate.pictures import draw_routing, draw_table
from mixtral_jax.evaluate.quantized import Made, check_calibration
from mixtral_jax.evaluate.routing_page import check_page, page
from mixtral_jax.evaluate.routing_report import names_of, study_json, tables
from mixtral_jax.evaluate.study import Study, check_architecture, study
from mixtral_jax.evaluate.table import Entry, Row, entries, read_configs, tabulate
from mixtral_jax.evaluate.text import Dataset, TextFile
from mixtral_jax.language_model import LanguageModel, load
from mixtral_jax.plots import check_plot, replacing
from mixtral_jax.sharding import hosts
from mixtral_jax.sharding.mesh import MeshSpec, simulate_on_cpu
from mixtral_jax.tokenizer import Tokenizer

_WIDTH = 140  # of tables, where nobody looks at a terminal

Options: TypeAlias = (
    Annotated[PerplexityOptions, tyro.conf.subcommand("perplexity")]
    | Annotated[ExactOptions, tyro.conf.subcommand("exact")]
    | Annotated[RoutingOptions, tyro.conf.subcommand("routing")]
    | Annotated[HarnessOptions, tyro.conf.subcommand("lm-eval")]
)


def main(
    options: PerplexityOptions | ExactOptions | RoutingOptions | HarnessOptions,
) -> int:
    """Runs one of the commands; process 0 prints."""
    if isinstance(options, HarnessOptions):
        return harness.run(options.arguments)
    hosts.join(options.processes, options)
    if isinstance(options, PerplexityOptions):
        return _perplexity(options)
    if isinstance(options, ExactOptions):
        return _exact(options)
    return _routing(options)


def _perplexity(options: PerplexityOptions) -> int:
    text = _check_text(options)
    if options.calibration is not None:
        check_calibration(options.calibration, options.text[0], text.dataset.sha256)
    questions = None if options.data is None else read_questions(options.data)
    configs = read_configs(
        options.checkpoints, terminal.note, sliding_window=options.load.sliding_window
    )
    options.windowing.fit(configs)
    wanted = entries(options.checkpoints, options.entry_schemes)
    tokenizers: list[Tokenizer] = []
    meshes: dict[str, str] = {}
    made: dict[Entry, Made] = {}
    rows: list[Row] = []
    passes = max(len(wanted) - 1, 1)
    if any(options.is_made(entry.scheme) for entry in wanted):
        _prepare_devices(options, configs[0])
    with _Bar() as bar:

        def load_entry(entry: Entry) -> LanguageModel:
            if options.is_made(entry.scheme):
                lm, made[entry] = _make_and_load(options, entry, bar)
            else:
                lm = _load(options, entry.checkpoint, entry.scheme, bar)
            meshes[entry.name] = str(lm.spec)
            tokenizers.append(_tokenizer(lm)) if not tokenizers else None
            return lm

        def token_ids(lm: LanguageModel) -> Iterator[int]:
            with bar.task("reading", text.dataset.bytes, passes) as advance:
                yield from text.token_ids(_tokenizer(lm), advance)

        def score(lm: LanguageModel) -> Any:
            assert questions is not None
            return score_of(*ask(lm, questions, chat=options.chat, watch=bar.watch("asking")))

        found_rows = tabulate(
            wanted,
            load_entry,
            token_ids,
            windowing=options.windowing,
            batch=options.batch,
            ask=None if questions is None else score,
        )
        for row in found_rows:
            rows.append(dataclasses.replace(row, made=made.get(row.entry)))
            if len(wanted) > 1:
                terminal.note(report.told(rows[-1]))
            if options.json and hosts.is_first():  # at once: a row is not lost with those after it
                line = report.row_json(
                    rows[-1], text.dataset, tokenizers[0], meshes[row.entry.name]
                )
                print(json.dumps(line), flush=True)
    if not hosts.is_first():
        return OK
    for row in rows:
        asked = 0 if row.exact is None else row.exact.dropped
        terminal.tell_dropped(row.entry.name, row.found.dropped + asked)
    if not options.json:
        mesh = ", ".join(dict.fromkeys(meshes.values()))
        _print_rows(rows, text.dataset, tokenizers[0], mesh)
    if options.plot is not None:  # last: a picture that cannot be written costs no number
        found = rows[0].found
        title = f"{text.dataset.file}: context {found.context}, stride {found.stride}"
        draw_table(rows, title, options.plot)
    return OK


def _print_rows(rows: Sequence[Row], dataset: Dataset, tokenizer: Tokenizer, mesh: str) -> None:
    found = rows[0].found
    lines = report.facts(
        dataset,
        tokenizer,
        context=found.context,
        stride=found.stride,
        tokens=found.tokens,
        mesh=mesh,
    )
    if len(rows) == 1:
        print(report.aligned(lines | report.one_row(rows[0], dataset)))
        return
    print(report.aligned(lines | report.calibration(rows)))
    _print_table(report.comparison(rows))
    for line in report.notes(rows):
        print(line)


def _prepare_devices(options: Shared, config: ModelConfig) -> None:
    """The mesh's devices, before quantizing has JAX start with one; and no second process."""
    if hosts.num_processes() > 1:
        raise MixtralError(
            "--schemes: some are quantized on the disk, which one process does",
            fix="quantize them first (python -m mixtral_jax.quantize) and name their folders",
            code=USAGE,
        )
    if options.load.mesh is not None:
        simulate_on_cpu(MeshSpec.parse(options.load.mesh).fit(config), lambda line: None)


def _make_and_load(
    options: PerplexityOptions, entry: Entry, bar: _Bar
) -> tuple[LanguageModel, Made]:
    """Loads it in the dtype that the checkpoint itself would be loaded in."""
    assert entry.scheme is not None
    dtype = options.load.dtype or ("float32" if entry.checkpoint == EMBEDDED else None)
    console = Console(stderr=True, soft_wrap=True)
    with contextlib.ExitStack() as stack:
        with Stop(console) as stop, bar.task(f"quantizing {entry.scheme}", None, 1) as advance:
            place = options.workplace()
            folder, made = stack.enter_context(
                place.make(
                    entry.checkpoint,
                    entry.scheme,
                    note=lambda line: terminal.note(f"{entry.scheme}: {line}"),
                    progress=advance,
                    stop=stop,
                )
            )
        return _load(options, str(folder), dtype, bar), made


def _exact(options: ExactOptions) -> int:
    questions = read_questions(options.data)
    with _Bar() as bar:
        lm = _load(options, options.checkpoint, None, bar)
        asked = ask(
            lm,
            questions,
            chat=options.chat,
            max_new_tokens=options.max_new_tokens,
            batch=options.batch,
            watch=bar.watch("asking"),
        )
    if not hosts.is_first():
        return OK
    score = score_of(*asked)
    terminal.tell_dropped(options.checkpoint, score.dropped)
    if not options.json:
        print(f"{score.right} of {score.asked} right: {score.accuracy:.2%}", end="")
        print(f" ({score.exact} of them end with the answer)")
        return OK
    for answer in asked.answers:
        line = dataclasses.asdict(answer)
        print(json.dumps(line.pop("question") | line))
    summary = {"checkpoint": options.checkpoint, "data": str(options.data), "chat": options.chat}
    dtype = str(lm.model.embed_tokens.get_value().dtype)
    counts = dataclasses.asdict(score) | {"accuracy": score.accuracy}
    print(json.dumps(summary | counts | {"dtype": dtype, "mesh": str(lm.spec)}))
    return OK


def _routing(options: RoutingOptions) -> int:
    if options.plot is not None:
        check_plot(options.plot)
    if options.html is not None:
        check_page(options.html)
    texts = [TextFile(path) for path in options.text]
    wanted = [entry for entry in (options.entry, options.other_entry) if entry is not None]
    names = [entry.checkpoint for entry in wanted]
    configs = read_configs(names, terminal.note, options.load.sliding_window)
    options.windowing.fit(configs)
    for name, config in zip(names[1:], configs[1:], strict=False):
        check_architecture(config, name, configs[0], names[0])
    with _Bar() as bar:
        models = [_load(options, entry.checkpoint, entry.scheme, bar) for entry in wanted]
        tokenizer = _tokenizer(models[0])
        with contextlib.ExitStack() as stack:
            found = study(
                models,
                texts,
                tokenizer=tokenizer,
                windowing=options.windowing,
                batch=options.batch,
                keep=0 if options.html is None else options.html_tokens // len(texts),
                watch=lambda text: stack.enter_context(
                    bar.task(f"reading {text.dataset.file}", text.dataset.bytes, 1)
                ),
            )
    if not hosts.is_first():
        return OK
    title = f"{options.entry.name} on {', '.join(names_of([text.dataset for text in texts]))}"
    terminal.tell_dropped(options.entry.name, found.total.dropped)
    if options.other_entry is not None:
        terminal.tell_dropped(options.other_entry.name, found.other_dropped)
    mesh = str(models[0].spec)
    if options.json:
        print(json.dumps(study_json(found, options.entry, options.other_entry, tokenizer, mesh)))
    else:
        _print_study(found, options, tokenizer, mesh)
    sys.stdout.flush()  # before what may fail
    if options.plot is not None:
        draw_routing(found, title, options.plot)
    if options.html is not None:
        with replacing(options.html) as partial:
            partial.write_text(page(found, title, tokenizer), encoding="utf-8")
    return OK


def _print_study(found: Study, options: RoutingOptions, tokenizer: Tokenizer, mesh: str) -> None:
    total = found.total
    for each in found.texts:
        lines = report.facts(
            each.dataset,
            tokenizer,
            context=total.context,
            stride=total.stride,
            tokens=each.counts.tokens,
            mesh=mesh,
        )
        print(report.aligned(lines))
    for about, table in tables(found, options.entry, options.other_entry):
        print(f"\n{about}")
        _print_table(table)
    print(terminal.expert_load(total.counts), end="")


def _check_text(options: PerplexityOptions) -> TextFile:
    """The text; and nothing is loaded for a picture that could not be drawn."""
    if options.plot is not None:
        check_plot(options.plot)
    return TextFile(options.text[0])


def _load(options: Shared, checkpoint: str, scheme: str | None, bar: _Bar) -> LanguageModel:
    options.load.refuse_offload("evaluate")
    fields = dataclasses.asdict(options.load)
    if scheme in DTYPES:
        fields["dtype"] = scheme
    elif scheme is not None:
        fields["quantize"] = scheme
    with bar.task("loading", None, 1) as advance:
        loaded = 0

        def progress(num_bytes: int) -> None:
            nonlocal loaded
            loaded += num_bytes
            advance(loaded)

        return load(checkpoint, note=terminal.note, progress=progress, **fields)


def _tokenizer(lm: LanguageModel) -> Tokenizer:
    if lm.tokenizer is None:
        raise MixtralError(
            f"{lm.folder} has no tokenizer.model, and text needs one",
            fix="copy it from the published checkpoint",
            code=INPUT_NOT_FOUND,
        )
    return lm.tokenizer


def _print_table(table: Any) -> None:
    console = Console()
    (console if console.is_terminal else Console(width=_WIDTH)).print(table)


class _Bar:
    """One line of progress on stderr, of process 0."""

    def __init__(self):
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),  # of files, by any name
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (console.is_terminal and hosts.is_first()),
        )
        self._passes = 0

    def __enter__(self) -> _Bar:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    @contextlib.contextmanager
    def task(self, what: str, total: int | None, passes: int) -> Iterator[Any]:
        """Gives a function to be called with what has been done so far."""
        if passes > 1:
            self._passes += 1
            what = f"{what} ({self._passes} of {passes})"
        task = self._progress.add_task(what, total=total)

        def advance(done: int, total: int | None = total) -> None:
            self._progress.update(task, completed=done, total=total)

        yield advance
        self._progress.remove_task(task)

    def watch(self, what: str) -> Any:
        """Wraps a sequence, to count what has been taken from it."""

        def wrapped(batches: Sequence[Any]) -> Iterable[Any]:
            with self.task(what, len(batches), 1) as advance:
                for done, each in enumerate(batches):
                    advance(done)
                    yield each

        return wrapped


def run(argv: Sequence[str]) -> int:
    """The command with these arguments; gives its exit code."""
    return cli.run_verb("evaluate", main, Options, passed_on(argv))


def passed_on(arguments: Sequence[str]) -> list[str]:
    """Arguments, those of lm-eval behind a -- that leaves them to it."""
    first, rest = list(arguments[:1]), list(arguments[1:])
    return [*first, "--", *rest] if first == ["lm-eval"] and rest else [*first, *rest]


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
