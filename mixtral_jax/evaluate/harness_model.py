"""The class that lm-eval calls; importing it imports lm-eval (see harness.py).

Which tokens are context and which continuation is decided as by lm-eval's own ``hf`` class
(``HFLM`` of lm_eval/models/huggingface.py, 0.4.13): whole and context are encoded, each with <s>,
and what the whole has beyond the context's length is scored; spaces at the context's end are moved
to the continuation. An empty context is <s>.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from mixtral_jax import language_model, terminal
from mixtral_jax.chat import encode_chat
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.errors import BAD_DATA, USAGE, MixtralError
from mixtral_jax.evaluate.likelihood import likelihoods
from mixtral_jax.evaluate.perplexity import DEFAULT_BATCH
from mixtral_jax.evaluate.windows import Window
from mixtral_jax.language_model import EMBEDDED
from mixtral_jax.load_options import LoadOptions

TemplateLM: Any = importlib.import_module("lm_eval.api.model").TemplateLM
_harness: Any = importlib.import_module("lm_eval.models.utils")
_windows: Any = importlib.import_module("lm_eval.utils")
_TEXTS = ("mesh", "adapter", "device_memory")  # options that lm-eval may read as numbers
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class HarnessModel(TemplateLM):
    """A model of this package as lm-eval sees one; arguments are those of ``--model_args``,
    which lm-eval may read as numbers or as texts: they are checked here.

    Args:
        pretrained: a checkpoint, as for ``load``.
        batch_size: texts read, and answers written, at a time; ``auto`` is 8.
        max_batch_size: not used: a batch is what was asked for.
        max_length: tokens that a text may have; the model's ``max_position_embeddings``, if None.
        max_gen_toks: tokens of an answer where a task does not say.
        add_bos_token: false encodes texts without <s>, as ``add_bos_token=False`` of ``hf``.
        seed: of sampling.
        device: not used: lm-eval always gives one, and a mesh says where a model lies.
        **options: of LoadOptions, as ``mesh=1x8`` and ``dtype=float32``.

    Raises:
        MixtralError: exit code 64 for other options, 66 without a tokenizer; as ``load``.
    """

    def __init__(
        self,
        pretrained: str = EMBEDDED,
        *,
        batch_size: int | str | None = DEFAULT_BATCH,
        max_batch_size: int | None = None,
        max_length: Any = None,
        max_gen_toks: Any = 256,
        add_bos_token: Any = True,
        seed: Any = 0,
        device: str | None = None,
        **options: Any,
    ):
        super().__init__()
        del max_batch_size, device
        known = {field.name for field in dataclasses.fields(LoadOptions)}
        if unknown := ", ".join(sorted(set(options) - known)):
            fix = f"one of {', '.join(sorted(known))}"
            raise MixtralError(f"--model_args has no {unknown}", fix=fix, code=USAGE)
        self.batch_size = _batch_size(batch_size)
        asked_length = None if max_length is None else _whole("max_length", max_length)
        self.max_gen_toks = _whole("max_gen_toks", max_gen_toks)
        self._seed = _whole("seed", seed)
        if not isinstance(add_bos_token, bool):
            expected, got = "True or False", repr(add_bos_token)
            raise MixtralError("add_bos_token", expected=expected, got=got, code=USAGE)
        self._add_bos = add_bos_token
        options |= {name: str(options[name]) for name in _TEXTS if options.get(name) is not None}
        if options.get("offload") is not None:
            LoadOptions(offload=options["offload"]).refuse_offload("lm-eval")
        self.lm = language_model.load(str(pretrained), note=terminal.note, **options)
        self.lm.encode("")  # an error unless there is a tokenizer
        longest = self.lm.config.max_position_embeddings
        self.max_length = longest if asked_length is None else asked_length
        if not 2 <= self.max_length <= longest:
            expected = f"2 to {longest} (max_position_embeddings)"
            raise MixtralError("max_length", expected=expected, got=max_length, code=USAGE)

    @property
    def _spelling(self) -> Any:
        assert self.lm.tokenizer is not None
        return self.lm.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The id of </s>."""
        return self._spelling.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        return self._spelling.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Part of the name of lm-eval's caches of requests."""
        return str(self.lm.folder).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; a text that begins with "<s>" is read as ``apply_chat_template`` wrote it."""
        del kwargs
        bos = self._spelling.pieces[self._spelling.bos_id]
        if add_special_tokens is None and string.startswith(bos):
            return self._encode_spelled(string)
        with_bos = self._add_bos if add_special_tokens is None else add_special_tokens
        return self._spelling.encode(string, bos=with_bos)

    def _encode_spelled(self, text: str) -> list[int]:
        """Control pieces by their names, and the text between them."""
        ids = []
        for part in self._spelling.control_pattern.split(text):
            if part in self._spelling.control_ids:
                ids.append(self._spelling.control_ids[part])
            elif part:
                ids += self._spelling.encode(part, bos=False)
        return ids

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation in the model's own format, with its control pieces spelled.

        Raises:
            MixtralError: exit code 65 where this text would not be read as the conversation's
                ids again, as when a message spells a control piece.
        """
        ids = encode_chat(
            self._spelling, chat_history, continue_final_message=not add_generation_prompt
        )
        text, run = "", []
        for token_id in [*ids, None]:
            if token_id is not None and not self._spelling.is_control(token_id):
                run.append(token_id)
                continue
            text += self._spelling.decode(run)
            run = []
            text += "" if token_id is None else self._spelling.pieces[token_id]
        if self._encode_spelled(text) != ids:
            what, fix = "a message cannot be written as text", "leave out --apply_chat_template"
            raise MixtralError(f"{what}: {text[:60]!r}", fix=fix, code=BAD_DATA)
        return text

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of continuations behind contexts.

        Raises:
            MixtralError: exit code 65 for a continuation of no token, which would be certain.
        """
        for request in requests:
            if not request.args[1]:
                raise _nothing_to_score(request.args)
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        cut = []
        for request, context, continuation in requests:
            if not continuation:
                raise _nothing_to_score(request)
            if len(continuation) > self.max_length:
                what, got = "tokens of a continuation", len(continuation)
                expected = f"at most {self.max_length}"
                raise MixtralError(what, expected=expected, got=got, code=BAD_DATA)
            ids = ((context or [self.prefix_token_id]) + continuation)[-(self.max_length + 1) :]
            cut.append(Window(0, len(ids) - len(continuation), ids))
        with tqdm(total=len(cut), desc="scoring", disable=disable_tqdm) as bar:
            found = likelihoods(self.lm, cut, batch=self.batch_size, watch=bar.update)
        terminal.tell_dropped("scoring", found.dropped)
        answers = [(each.logprob, each.is_greedy) for each in found.each]
        for (request, _, _), answer in zip(requests, answers, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in the windows of ``hf``: each holds as much context as fits."""
        pieces, counts = [], []
        for request in requests:
            rolled = _windows.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [_windows.make_disjoint_window(window) for window in rolled]
            pieces += [(None, list(context), list(scored)) for context, scored in pairs]
            counts.append(len(pairs))
        scored = iter(self._loglikelihood_tokens(pieces, disable_tqdm))
        totals = [sum(next(scored)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop string, </s> or ``max_gen_toks``; greedy unless a task says."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(place)
        found: dict[int, str] = {}
        dropped = 0
        with tqdm(total=len(requests), desc="writing", disable=disable_tqdm) as bar:
            for places in groups.values():
                kwargs = requests[places[0]].args[1]
                options, room = self._sampling(kwargs)
                encoded = {i: self.tok_encode(requests[i].args[0])[-room:] for i in places}
                ids = {i: found or [self.prefix_token_id] for i, found in encoded.items()}
                places.sort(key=lambda i: -len(ids[i]))
                for start in range(0, len(places), self.batch_size):
                    taken = places[start : start + self.batch_size]
                    # As ``hf``, an answer is decoded on its own: a space before it is lost.
                    # A repeated request is another sample, in batches of any size.
                    rows = [ids[i] for i in taken]
                    batch = self.lm.batch(rows, options, is_answer=True, first_samples=taken)
                    completions = self.lm.complete(batch)
                    dropped += completions[0].dropped  # of the whole batch
                    for i, done in zip(taken, completions, strict=True):
                        if done.error:
                            raise MixtralError(done.error, code=BAD_DATA)
                        found[i] = done.generated_text or ""
                        args = requests[i].args
                        self.cache_hook.add_partial("generate_until", args, found[i])
                    bar.update(len(taken))
        terminal.tell_dropped("writing", dropped)
        return [found[place] for place in range(len(requests))]

    def _sampling(self, kwargs: Mapping[str, Any]) -> tuple[SamplingOptions, int]:
        """Options of a task, and how many tokens of a context they leave room for."""
        asked = dict(_harness.normalize_gen_kwargs(dict(kwargs), self.max_gen_toks))
        until = _harness.handle_stop_sequences(asked.pop("until", None), eos=None)
        tokens, is_sampled = asked.pop("max_gen_toks"), asked.pop("do_sample")
        if unknown := ", ".join(sorted(set(asked) - {*_SAMPLING})):
            fix = f"use {', '.join(_SAMPLING)}, do_sample, until and max_gen_toks"
            raise MixtralError(f"--gen_kwargs {unknown}", fix=fix, code=USAGE)
        fields = {name: value for name, value in asked.items() if value is not None}
        if not is_sampled:
            fields["temperature"] = 0.0
        room = self.max_length - tokens
        if room < 1:
            expected = f"below {self.max_length} (max_length)"
            fix = f"--gen_kwargs max_gen_toks={min(64, self.max_length // 2)}"
            raise MixtralError("max_gen_toks", expected=expected, got=tokens, fix=fix, code=USAGE)
        stop = tuple(text for text in until if text)
        sizes = {"max_new_tokens": tokens, "seed": self._seed, "stop": stop}
        return SamplingOptions(**sizes, **fields), room


def _nothing_to_score(request: object) -> MixtralError:
    return MixtralError(
        f"request {str(request)[:200]}: nothing to score",
        expected="a continuation of one token or more behind its context",
        got="none: it is empty, or merges with the context's last token",
        fix="end contexts, or begin choices, with a space (target_delimiter of the task)",
        code=BAD_DATA,
    )


def _whole(name: str, given: object) -> int:
    """A whole number, which lm-eval may give as a text."""
    if isinstance(given, bool) or not str(given).isdecimal():
        got = repr(given)
        raise MixtralError(f"--model_args {name}", expected="a number", got=got, code=USAGE)
    return int(str(given))


def _batch_size(given: int | str | None) -> int:
    if given is None or str(given).startswith("auto"):
        return DEFAULT_BATCH
    if not str(given).isdecimal() or int(given) < 1:
        expected, fix = "a number, 1 or more, or auto", "--batch_size 8"
        raise MixtralError("--batch_size", expected=expected, got=given, fix=fix, code=USAGE)
    return int(given)
