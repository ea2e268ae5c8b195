"""What config.json says of RoPE, in three places that must agree.

Transformers 4 has ``rope_theta`` and, for scaled kinds, ``rope_scaling``; transformers 5 has
``rope_parameters``, and lets a ``rope_scaling`` beside it win.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mixtral_jax.errors import BAD_CONFIG, MixtralError

KEYS = ("rope_parameters", "rope_scaling")
_KINDS = ("rope_type", "type")


def read_rope_theta(raw: Mapping[str, Any], source: str, note: Callable[[str], None]) -> Any:
    """The base of the rotation, as it stands in the file.

    Args:
        raw: the parsed config.json.
        source: the file's name, for error lines.
        note: called with one line if fields are not used.

    Raises:
        MixtralError: exit code 78 for scaled RoPE, for values that contradict each other, and
            where there is none.
    """
    thetas = {"rope_theta": raw.get("rope_theta")}
    for key in KEYS:
        fields = raw.get(key)
        if fields is None:
            continue
        if not isinstance(fields, Mapping):
            fix = "keep the one that was published with the weights"
            raise _refuse(f"{source} field {key}", "a JSON object", fields, fix)
        for kind in _KINDS:
            if fields.get(kind) not in (None, "default"):
                fix = "scaled RoPE is not part of the Mixtral family"
                raise _refuse(f"{source} field {key}.{kind}", "'default'", fields[kind], fix)
        unknown = sorted(fields.keys() - {*_KINDS, "rope_theta"})
        if unknown:
            note(f"{source}: not used in {key}: {', '.join(map(repr, unknown))}")
        thetas[f"{key}.rope_theta"] = fields.get("rope_theta")
    found = {name: theta for name, theta in thetas.items() if theta is not None}
    if not found:
        raise MixtralError(
            f"{source} lacks rope_theta",
            fix="use the file that was published with the weights (Mixtral: 1000000.0)",
            code=BAD_CONFIG,
        )
    first, *others = found
    for other in others:
        if found[other] != found[first]:
            expected = f"{found[first]!r}, as in {first}"
            fix = "keep the one that was published with the weights"
            raise _refuse(f"{source} field {other}", expected, found[other], fix)
    return found[first]


def _refuse(what: str, expected: str, got: object, fix: str) -> MixtralError:
    return MixtralError(what, expected=expected, got=repr(got), fix=fix, code=BAD_CONFIG)
