"""How GPTQ quantizes, and which parts it makes of a weight."""

from __future__ import annotations

import dataclasses

from mixtral_jax.convert.parts import PartPath, part_spec
from mixtral_jax.errors import BAD_CONFIG, USAGE, MixtralError
from mixtral_jax.model.transformer import LeafSpec
from mixtral_jax.qtensor import SCHEMES

BITS = (2, 3, 4, 8)
GROUPS = (32, 64, 128)
# As the scales of int4: codes are chosen for the rounded scale, so rounding costs nothing.
SCALES = "bfloat16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptqRecipe:
    """How weights are quantized (arXiv 2210.17323).

    Attributes:
        bits: of a code.
        group: inputs that share a scale; None for a whole row.
        symmetric: no zero points.
        act_order: the inputs that move outputs most are quantized first.
        damp: this share of the mean of the Hessian's diagonal is added to the diagonal.
        all_token_hessians: every expert's Hessian is of all tokens, not of those routed to it.
    """

    bits: int = 4
    group: int | None = 128
    symmetric: bool = True
    act_order: bool = False
    damp: float = 0.1
    all_token_hessians: bool = False

    def __post_init__(self):
        if self.bits not in BITS:
            expected = ", ".join(map(str, BITS))
            raise MixtralError("--bits", expected=expected, got=self.bits, code=USAGE)
        if self.group is not None and self.group not in GROUPS:
            expected = ", ".join(map(str, (-1, *GROUPS)))
            raise MixtralError("--group-size", expected=expected, got=self.group, code=USAGE)
        if not 0 < self.damp <= 10:
            raise MixtralError("--damp", expected="above 0, at most 10", got=self.damp, code=USAGE)

    @property
    def scheme(self) -> str:
        """The key of ``SCHEMES``."""
        return f"gptq{self.bits}"

    @property
    def keeps_order(self) -> bool:
        """Whether columns stay in activation order; without groups they are put back."""
        return self.act_order and self.group is not None

    def part_specs(self, leaf: str, spec: LeafSpec) -> dict[str, LeafSpec]:
        """The parts of a weight, by path.

        Raises:
            MixtralError: exit code 78 for rows of no whole groups or bytes.
        """
        inputs, scheme = spec.shape[-1], self.scheme
        unit = SCHEMES[scheme].unit[0]
        if inputs % (self.group or 1) or inputs % unit:
            fitting = [size for size in GROUPS if inputs % size == 0]
            fix = f"--group-size {fitting[-1] if fitting else -1}"
            raise MixtralError(
                f"{leaf}: {scheme} needs rows of whole groups and bytes",
                expected=f"a multiple of {max(self.group or 1, unit)} inputs",
                got=inputs,
                fix=fix if inputs % unit == 0 else "choose other --bits",
                code=BAD_CONFIG,
            )
        names = ["codes", "scales"]
        names += [] if self.symmetric else ["zeros"]
        names += ["order"] if self.keeps_order else []
        groups = inputs // (self.group or inputs)
        return {
            str(PartPath(leaf, scheme, name)): part_spec(spec, scheme, name, groups, SCALES)
            for name in names
        }
