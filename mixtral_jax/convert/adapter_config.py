"""Reads adapter_config.json of PEFT: ranks and scales, and what is not plain LoRA refused."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, MixtralError
from mixtral_jax.json_file import read_json

LARGEST = 1_000_000  # no rank or alpha is
_LONGEST_NAME = 64  # of a module, about
_MOST_TRIES = 1 << 20

# Fields that change what the tensors mean; each must be absent, null, false or empty.
REFUSED = (
    "use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices",
    "layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora",
    "kasa_config", "monteclora_config", "megatron_config",
)  # fmt: skip
# Initialisations that take the start of the adapter out of the base it was trained on.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Of base_model_name_or_path, which may be any name or path.
_OURS = re.compile("mixtral", re.IGNORECASE)
_OTHER_FAMILY = re.compile(
    r"(?<![a-z])(llama|qwen|gemma|phi-?\d|falcon|gpt|opt-|bloom|deepseek|mistral-7b|mistral-nemo)",
    re.IGNORECASE,
)


class LoraConfig:
    """What adapter_config.json says of ranks and scales.

    Attributes:
        digest: sha256 (hex) of all fields.
        other_base: what it was trained on, where that is clearly no Mixtral.

    Raises:
        MixtralError: exit code 65 for what is not plain LoRA, with the fix.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            fields = read_json(path, fix="use the file that peft wrote")
        except FileNotFoundError:
            fix = "name a folder that peft's save_pretrained wrote"
            raise MixtralError(f"no such file: {path}", fix=fix, code=INPUT_NOT_FOUND) from None
        canonical = json.dumps(fields, sort_keys=True).encode()
        self.digest = hashlib.sha256(canonical).hexdigest()
        if fields.get("peft_type") != "LORA":
            raise self.refuse("peft_type", "LORA", fields.get("peft_type"), "train a LoRA adapter")
        for name in REFUSED:
            if fields.get(name):
                fix = "train without it, or merge the adapter with peft and load the result"
                raise self.refuse(name, "none", _short(fields[name]), fix)
        if fields.get("bias", "none") != "none":
            raise self.refuse("bias", "none", _short(fields["bias"]), "train with bias='none'")
        start = fields.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
            fix = "save it again with path_initial_model_for_weight_conversion"
            raise self.refuse("init_lora_weights", "one that keeps the base", _short(start), fix)
        base = str(fields.get("base_model_name_or_path") or "")
        self.other_base = base if _OTHER_FAMILY.search(base) and not _OURS.search(base) else None
        self._rank, self._alpha = fields.get("r"), fields.get("lora_alpha")
        self._rank_pattern = self._pattern(fields, "rank_pattern")
        self._alpha_pattern = self._pattern(fields, "alpha_pattern")
        self._is_rslora = bool(fields.get("use_rslora"))
        self._modules = fields.get("target_modules")
        if fields.get("layers_to_transform") is not None or fields.get("exclude_modules"):
            self._modules = None  # the tensors alone say which modules are adapted
        self._parameters = fields.get("target_parameters")
        for name, values in {
            "r": [self._rank, *self._rank_pattern.values()],
            "lora_alpha": [self._alpha, *self._alpha_pattern.values()],
        }.items():
            kinds = int if name == "r" else (int, float)
            for value in values:
                sound = isinstance(value, kinds) and not isinstance(value, bool)
                lowest = 1 if name == "r" else -LARGEST
                if not sound or not lowest <= value <= LARGEST:
                    wanted = "a whole number above 0" if name == "r" else "a number"
                    raise self.refuse(name, wanted, _short(value), "use the file that peft wrote")

    def rank(self, module: str) -> int:
        """The rank of a module or parameter, by its name in the base model."""
        return _match(self._rank_pattern, module, cast(int, self._rank))

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised adapters."""
        rank, alpha = self.rank(module), _match(self._alpha_pattern, module, self._alpha)
        return float(alpha / (math.sqrt(rank) if self._is_rslora else rank))

    def targets(self, name: str, *, is_parameter: bool) -> bool:
        """True for what a list in the file names for certain, so that it must have tensors."""
        named = self._parameters if is_parameter else self._modules
        return isinstance(named, list) and any(f".{name}".endswith(f".{end}") for end in named)

    @property
    def module_targets(self) -> tuple[str, ...]:
        """The names that ``target_modules`` lists; none where it is a pattern."""
        return _listed(self._modules)

    @property
    def parameter_targets(self) -> tuple[str, ...]:
        """The names that ``target_parameters`` lists."""
        return _listed(self._parameters)

    def refuse(self, field: str, expected: object, got: object, fix: str) -> MixtralError:
        """An error that names the file and the field."""
        what = f"{self.path}: {field}"
        return MixtralError(what, expected=expected, got=got, fix=fix, code=BAD_DATA)

    def _pattern(self, fields: Mapping[str, Any], name: str) -> dict[str, Any]:
        pattern = fields.get(name) or {}
        try:
            for key in dict(pattern):
                re.compile(rf"(.*\.)?({key})$")
        except (re.error, TypeError, ValueError, OverflowError, RecursionError):
            got = _short(pattern)
            raise self.refuse(
                name, "an object of regexes", got, "use the file that peft wrote"
            ) from None
        if sum(map(_tries, pattern)) > _MOST_TRIES:
            got, fix = _short(pattern), "write out the modules that it means"
            raise self.refuse(name, "regexes that are matched in little time", got, fix)
        return dict(pattern)


def _tries(key: str) -> float:
    """At most so many ways to match a regex to a name; infinite where none of this tells."""
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", key).replace("(?:", "(")  # one character each
    if "(?" in bare or re.search(r"\)[*+{]", bare):
        return math.inf
    tries, alternatives = 1, [1]
    for character in bare:
        if character == "(":
            alternatives.append(1)
        elif character == "|":
            alternatives[-1] += 1
        elif character == ")":
            tries *= alternatives.pop()
        elif character == "?":
            tries *= 2
        elif character in "*+{":
            tries *= _LONGEST_NAME
        if tries > _MOST_TRIES:
            return math.inf
    return tries * alternatives[0]


def _listed(names: Any) -> tuple[str, ...]:
    return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _match(pattern: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """The first entry whose key matches a whole dotted ending, as peft's get_pattern_key."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise
