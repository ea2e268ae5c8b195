"""The Python API: ``load`` a checkpoint onto a mesh and generate, chat, stream or score."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.chat import encode_chat
from mixtral_jax.config import ModelConfig, read_config
from mixtral_jax.convert.adapter import Adapter
from mixtral_jax.convert.hub import EMBEDDED, EMBEDDED_FOLDER, resolve  # noqa: F401 (a name of ours)
from mixtral_jax.convert.load import load_weights
from mixtral_jax.convert.save import save_model
from mixtral_jax.decode.completion import Batch, Completion
from mixtral_jax.decode.executor import Executor, Resident
from mixtral_jax.decode.generate import Generation, check_token_ids, row_bucket
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.decode.steps import STEPS_PER_CALL
from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, USAGE, MixtralError
from mixtral_jax.kernels.scaled_kv import KVDtype
from mixtral_jax.kernels.table import kernels_for
from mixtral_jax.load_options import LoadOptions, load_facts
from mixtral_jax.model.placement import Placement
from mixtral_jax.model.transformer import Mixtral, leaf_specs
from mixtral_jax.offload.executor import OffloadExecutor
from mixtral_jax.offload.load import offloading, resident
from mixtral_jax.quantize.load import quantizing, report
from mixtral_jax.sharding import hosts
from mixtral_jax.sharding.agreement import short
from mixtral_jax.sharding.mesh import MeshSpec, fitted_spec
from mixtral_jax.sharding.place import weight_shardings
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.sharding.strategy import Strategy
from mixtral_jax.tokenizer import Tokenizer, find_tokenizer

# Tokens between two looks at stop strings, and between two pieces of a stream.
STEPS_PER_LOOK = 8
STEPS_PER_PIECE = 4

Message = Mapping[str, Any]


def _silent(line: str) -> None:
    del line


def load(
    checkpoint: str | Path = EMBEDDED,
    *,
    note: Callable[[str], None] = _silent,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> LanguageModel:
    """Loads a checkpoint straight onto a mesh, each device reading only its own experts.

    Args:
        checkpoint: a folder written by ``convert``, a Hugging Face or native Mistral folder,
            ``"tiny"``, or ``org/name[@revision]`` on the Hub.
        note: called with one line where something is not as published or asked.
        progress: called with the number of bytes just read, from several threads.
        **options: fields of LoadOptions.

    Raises:
        MixtralError: with the exit code of the command line.
    """
    if isinstance(options.get("mesh"), MeshSpec):
        options["mesh"] = str(options["mesh"])
    try:
        asked = LoadOptions(**options)
    except TypeError as error:
        raise MixtralError(f"load: {error}", code=USAGE) from None
    spec = None if asked.mesh is None else MeshSpec.parse(asked.mesh)
    folder = resolve(checkpoint, note).folder
    config = read_config(folder, sliding_window=asked.sliding_window, note=note)
    hosts.agree("load", lambda: load_facts(asked, folder))
    dtype = asked.dtype or ("float32" if str(checkpoint) == EMBEDDED else None)
    if asked.offload and spec is None:
        spec = MeshSpec()
    spec = fitted_spec(spec, config, note)
    strategy = Strategy(attention=asked.attention)
    strategy.check(config, spec)
    mesh = spec.build()
    kernels = asked.kernels or kernels_for(mesh.devices.flat[0].platform)
    adapter = None if asked.adapter is None else Adapter(asked.adapter, config, base=folder)
    way = resident(
        config,
        sharding_of=weight_shardings(leaf_specs(config), mesh, strategy).__getitem__,
        source=quantizing(asked.quantize, verify=asked.verify),
        kernels=kernels,
    )
    if asked.offload:
        way = offloading(way, asked.device_memory, device=mesh.devices.flat[0], dtype=dtype)

    def adapt(leaves: dict[str, Any]) -> dict[str, Any]:
        for line in adapter.notes if adapter else ():
            note(line)
        return adapter.attach(leaves, way.sharding_of) if adapter else leaves

    leaves = load_weights(
        folder,
        config,
        sharding_of=way.sharding_of,
        source=way.source,
        adapt=adapt,
        dtype=dtype,
        expert_shards=spec.expert,
        layout=way.layout,
        verify=asked.verify,
        progress=progress,
        note=note,
    )
    report(leaves, leaf_specs(config), asked.quantize, note)
    hosts.barrier("loaded")
    model, executor = way.assemble(leaves)
    has_tokenizer = find_tokenizer(folder) is not None
    return LanguageModel(
        model,
        executor=executor,
        tokenizer=Tokenizer.from_folder(folder) if has_tokenizer else None,
        placement=MeshPlacement(mesh, asked.dispatch_options(), kernels, strategy),
        spec=spec,
        kv_dtype=asked.kv_dtype,
        folder=folder,
        note=note,
    )


class LanguageModel:
    """A model on its mesh, with its tokenizer.

    Attributes:
        config: sizes.
        tokenizer: None where the checkpoint has none; only text needs one.
        folder: where it was loaded from.
        kv_dtype: of the cache that generation reads; ``logits`` needs none.
        executor: runs the passes; an ``OffloadExecutor`` reports on itself.
    """

    def __init__(
        self,
        model: Mixtral,
        *,
        tokenizer: Tokenizer | None,
        placement: Placement,
        spec: MeshSpec,
        executor: Executor | None = None,
        folder: Path | None = None,
        kv_dtype: KVDtype | None = None,
        note: Callable[[str], None] = _silent,
    ):
        self.model, self.placement, self.spec, self.folder = model, placement, spec, folder
        self.kv_dtype: KVDtype | None = kv_dtype
        self.executor: Executor = executor or Resident(model, placement)
        self.config: ModelConfig = model.config
        self.tokenizer = tokenizer
        self._note = note
        if tokenizer is not None and tokenizer.vocab_size > self.config.vocab_size:
            raise MixtralError(
                "tokenizer",
                expected=f"at most {self.config.vocab_size} pieces (the model's vocabulary)",
                got=tokenizer.vocab_size,
                fix="use the tokenizer that was published with the weights",
            )
        if tokenizer is not None:
            self._compare_ids(tokenizer)

    def _compare_ids(self, tokenizer: Tokenizer) -> None:
        """Prompts begin with the tokenizer's <s>, rows end at the config's ids: they must fit."""
        bos, eos = self.config.bos_token_id, self.config.eos_token_ids
        if tokenizer.bos_id != bos:
            self._note(f"config has bos_token_id {bos}, the tokenizer's <s> is {tokenizer.bos_id}")
        if tokenizer.eos_id not in eos:
            self._note(
                f"config has eos ids {list(eos)}, the tokenizer's </s> is {tokenizer.eos_id}"
            )

    def logits(self, token_ids: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """Teacher-forced logits.

        Args:
            token_ids: ints ``[B, T]``; rows of equal length.

        Returns:
            float32 numpy ``[B, T, V]``.

        Raises:
            MixtralError: exit code 65 for ids outside the vocabulary or logits that are NaN or
                infinite; 64 for rows that are not of one length, or too long.
        """
        rows = _integers(token_ids)
        if len({len(row) for row in rows}) != 1:
            raise MixtralError("token_ids: expected rows of one length", code=USAGE)
        longest = self.config.max_position_embeddings
        if len(rows[0]) > longest:
            got = len(rows[0])
            raise MixtralError("token_ids", expected=f"at most {longest}", got=got, code=USAGE)
        check_token_ids(rows, self.config)
        B, T = row_bucket(len(rows), self.spec.data), -(-len(rows[0]) // 16) * 16
        # Padding repeats the row: a masked NaN is NaN still, so no row may meet another's tokens.
        padding = ((0, B - len(rows)), (0, T - len(rows[0])))
        tokens = np.pad(np.asarray(rows, np.int32), padding, mode="edge")
        valid = np.pad(np.ones((len(rows), len(rows[0])), np.bool_), padding)
        hosts.agree("logits", lambda: {"the token ids": short(rows)})
        hosts.begin_step()
        logits = np.asarray(hosts.fetch(self.executor.score(tokens, valid)))[
            : len(rows), : len(rows[0])
        ]
        for row, scores in enumerate(logits):
            if not np.isfinite(scores).all():
                what = f"token_ids row {row}: logits are NaN; the weights are damaged"
                raise MixtralError(what, code=BAD_DATA)
        return logits

    def generate(
        self,
        prompts: Sequence[str] | None = None,
        *,
        prompt_token_ids: Sequence[Sequence[int]] | None = None,
        options: SamplingOptions | None = None,
        **fields: Any,
    ) -> list[Completion]:
        """Generates for a batch of prompts.

        Args:
            prompts: texts; one <s> is put before each.
            prompt_token_ids: ids instead, used as they are.
            options: of every row; or give its ``fields``.
            **fields: of SamplingOptions (``max_new_tokens=64``, ``temperature=0.7``, ...).

        Returns:
            ``num_samples`` completions for each prompt, in order.
        """
        options = _options(options, fields)
        if (prompts is None) == (prompt_token_ids is None):
            raise MixtralError("generate: give prompts or prompt_token_ids", code=USAGE)
        if prompts is not None:
            if isinstance(prompts, str) or not all(isinstance(text, str) for text in prompts):
                got = "one text" if isinstance(prompts, str) else repr(prompts)[:60]
                expected, fix = "a list of texts", "generate([text])"
                raise MixtralError("prompts", expected=expected, got=got, fix=fix, code=USAGE)
            ids = [self.encode(prompt) for prompt in prompts]
            return self.complete(self.batch(ids, options, prompts=prompts))
        assert prompt_token_ids is not None
        return self.complete(self.batch(_integers(prompt_token_ids), options))

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Message] | None = None,
        options: SamplingOptions | None = None,
        **fields: Any,
    ) -> Completion:
        """Answers one conversation in the model's own chat format, once."""
        ids, asked = self.encode_chat(messages, tools), _one_sample(_options(options, fields))
        return self.complete(self.batch([ids], asked, is_answer=True))[0]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, one <s> first."""
        return self._require_tokenizer().encode(text)

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Message] | None = None
    ) -> list[int]:
        """Token ids of a conversation, as mistral-common builds them."""
        return encode_chat(self._require_tokenizer(), messages, tools=tools)

    def batch(
        self,
        ids: Sequence[Sequence[int]],
        options: SamplingOptions,
        *,
        prompts: Sequence[str] | None = None,
        is_answer: bool = False,
        first_samples: Sequence[int] | None = None,
    ) -> Batch:
        """Prompts ready to run; arguments as for ``Batch``."""
        check_token_ids(ids, self.config)
        return Batch(
            ids,
            options,
            eos_ids=self.config.eos_token_ids,
            prompts=prompts,
            tokenizer=self.tokenizer,
            is_answer=is_answer,
            first_samples=first_samples,
        )

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        options: SamplingOptions | None = None,
        **fields: Any,
    ) -> Iterator[str]:
        """Yields the text of one answer as it is written.

        Args:
            prompt: a text to continue, or the messages of a conversation.
            options: or its ``fields``, as for ``generate``.
            **fields: see ``generate``.
        """
        asked = _one_sample(_options(options, fields))
        if isinstance(prompt, str):
            batch = self.batch([self.encode(prompt)], asked)
        else:
            batch = self.batch([self.encode_chat(prompt)], asked, is_answer=True)
        for pieces in self.run(batch, STEPS_PER_PIECE):
            if pieces[0]:
                yield pieces[0]
        completion = batch.completions()[0]
        if completion.error:
            raise MixtralError(completion.error, code=BAD_DATA)
        rest = batch.rest(0)
        if rest:
            yield rest

    def run(self, batch: Batch, steps: int = STEPS_PER_PIECE) -> Iterator[list[str]]:
        """Generates a batch, filling it; yields every row's new text after so many tokens."""
        if not batch.requests:
            return
        hosts.agree("generate", lambda: {"the batch": short(batch.requests)})
        offloaded = self.executor if isinstance(self.executor, OffloadExecutor) else None
        before = offloaded and offloaded.report()
        generation = Generation(
            self.model,
            batch.requests,
            placement=self.placement,
            data_shards=self.spec.data,
            speculate=batch.options.speculate,
            kv_dtype=self.kv_dtype,
            executor=self.executor,
        )
        for chunk in generation.chunks(steps):
            yield batch.take(chunk, generation.stop)
        batch.finish(generation.progress)
        dropped = generation.progress.dropped
        if any(dropped):
            counts = ", ".join(map(str, dropped))
            self._note(f"dropped {sum(dropped)} expert assignments; per layer: {counts}")
        if offloaded and before:
            self._note(offloaded.report().since(before).line())

    def save(self, dst: str | Path) -> str:
        """Saves weights and small files as ``convert`` does (see save_model); gives the digest."""
        if isinstance(self.executor, OffloadExecutor):
            raise MixtralError("save: the experts are offloaded", fix="convert", code=USAGE)
        return save_model(self.model, dst, companions=self.folder, note=self._note).digest

    def complete(self, batch: Batch) -> list[Completion]:
        """Generates a batch to its end."""
        for _ in self.run(batch, STEPS_PER_LOOK if batch.options.stop else STEPS_PER_CALL):
            pass
        return batch.completions()

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise MixtralError(
                "this checkpoint has no tokenizer.model",
                fix="copy it from the published checkpoint, or give token ids",
                code=INPUT_NOT_FOUND,
            )
        return self.tokenizer


def _integers(rows: Sequence[Sequence[int]] | np.ndarray) -> list[tuple[int, ...]]:
    """Token ids as ints; what is none is refused, never rounded."""
    try:
        return [tuple(operator.index(token_id) for token_id in row) for row in rows]
    except TypeError:
        raise MixtralError(
            "token ids", expected="rows of integers, [[1, 2, 3]]", got=repr(rows)[:60], code=USAGE
        ) from None


def _one_sample(options: SamplingOptions) -> SamplingOptions:
    if options.num_samples != 1:
        fix = "generate(..., num_samples=n)"
        got = options.num_samples
        raise MixtralError("num_samples", expected="1 here", got=got, fix=fix, code=USAGE)
    return options


def _options(options: SamplingOptions | None, fields: Mapping[str, Any]) -> SamplingOptions:
    known = {field.name for field in dataclasses.fields(SamplingOptions)}
    unknown = ", ".join(sorted(set(fields) - known))
    if unknown:
        raise MixtralError(f"generate has no option {unknown}", code=USAGE)
    if "stop" in fields:
        stop = fields["stop"]
        as_tuple = {type(None): lambda _: (), str: lambda text: (text,), list: tuple}
        fields = {**fields, "stop": as_tuple.get(type(stop), lambda other: other)(stop)}
    return dataclasses.replace(options or SamplingOptions(), **fields)
