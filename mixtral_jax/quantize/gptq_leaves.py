"""A checkpoint that GPTQ quantizes while it is read, layer by layer.

Whoever reads the first part of a layer waits until the layer is made. What an earlier run has
written is not made again: the calibration text is only taken through it.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mixtral_jax.config import ModelConfig
from mixtral_jax.convert.dequantized import read_chunk
from mixtral_jax.convert.finite import all_finite
from mixtral_jax.convert.leaves import Leaves
from mixtral_jax.convert.names import Chunk, chunks_of
from mixtral_jax.convert.orbax import read_leaf
from mixtral_jax.convert.orbax_leaves import WEIGHTS
from mixtral_jax.convert.parts import join, split_path
from mixtral_jax.errors import interrupted
from mixtral_jax.qtensor import QTensor
from mixtral_jax.quantize.calibration import digest
from mixtral_jax.quantize.errors import MatrixError
from mixtral_jax.quantize.gptq_layer import LayerInput, LayerPass, batches_of, embedded
from mixtral_jax.quantize.gptq_matrices import Calibrated, NewMatrices, OldMatrices
from mixtral_jax.quantize.gptq_report import LayerReport, told
from mixtral_jax.quantize.recorded import recorded, weight_of_codes
from mixtral_jax.quantize.source import DerivedLeaves, not_finite, origin_of


class GptqLeaves(DerivedLeaves):
    """The leaves of ``source`` with what the recipe quantizes in few bits.

    Leaves are to be read layer by layer; to go back is to begin again.

    Args:
        source: a checkpoint of plain weights.
        config: the model's.
        recipe: how.
        windows: calibration text.
        written: where an earlier run may have written layers, all of whose parts are then sound.
        note: called with one line for each layer that is finished.
        say: called with what is being done.
        stop: asked before each matrix; True ends the work there.

    Attributes:
        specs: as for ``Leaves``.
        errors: of each matrix that was quantized.
        reports: of each layer that was quantized.

    Raises:
        MixtralError: exit code 65 if the source is quantized already, 78 if its rows are no whole
            groups.
    """

    def __init__(
        self,
        source: Leaves,
        config: ModelConfig,
        recipe: Calibrated,
        windows: list[np.ndarray],
        *,
        written: Path,
        note: Callable[[str], None] = lambda line: None,
        say: Callable[[str], None] = lambda line: None,
        stop: Callable[[], bool] = lambda: False,
    ):
        super().__init__(source, recipe.scheme, recipe.part_specs)
        self._config, self._recipe, self._written = config, recipe, written
        self._note, self._say, self._stop = note, say, stop
        self._windows = digest(windows)
        self._batches = batches_of(windows, max(map(len, windows)))
        self.errors: dict[Chunk, MatrixError] = {}
        self.reports: dict[int, LayerReport] = {}
        self._making = threading.Lock()
        self._is_proved = False
        # The layer that was made last, its parts, and the residual stream after it.
        self._layer: int | None = None
        self._parts: dict[tuple[Chunk, str], np.ndarray] = {}
        self._hidden: list[np.ndarray] = []

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the source, the recipe and the text."""
        recipe = dataclasses.asdict(self._recipe)
        return {"source": self.source.fingerprint, "gptq": recipe, "calibration": self._windows}

    @property
    def machine(self) -> dict[str, Any]:
        """See MadeTogether: sums of f32 round in the order that these choose."""
        device = jax.devices()[0]
        kind = f"{device.platform} {device.device_kind}"
        return {"jax": jax.__version__, "device": kind, "cpus": os.cpu_count()}

    def together(self, leaf: str) -> str:
        """See MadeTogether: a layer is solved for in one go."""
        return leaf if split_path(leaf) is None else f"layer {leaf.split('.')[1]}"

    def read_rows(self, chunk: Chunk, start: int, stop: int, out: np.ndarray) -> None:
        """See Leaves; of parts, all rows."""
        part = split_path(chunk.leaf)
        if part is None:
            self._read_plain(chunk, start, stop, out)
            return
        layer = _layer_of(chunk.leaf)
        with self._making:
            if self._layer != layer:
                self._make(layer)
            found = self._parts[origin_of(chunk), part.part]
        out[...] = found.reshape(out.shape)

    def report(self, leaf: str) -> dict[str, Any] | None:
        """See Reporting."""
        if weight_of_codes(leaf) is None:
            return None
        return recorded(leaf, self.errors, self.reports[_layer_of(leaf)])

    def _make(self, layer: int) -> None:
        """Goes through all layers up to this one, and quantizes this one."""
        if self._layer is None or layer < self._layer:
            self._prove_source()
            self._hidden = embedded(self._read(Chunk("embed_tokens", None)), self._batches)
            self._layer = None
        for i in range(0 if self._layer is None else self._layer + 1, layer + 1):
            self._parts, self._layer = {}, None  # until the layer is done
            weights = {} if i == layer else self._weights_written(i)
            if weights:
                self._say(f"layer {i} (made earlier)")
                self._pass(i, OldMatrices(weights, self._read)).run(self._hidden)
            else:
                self._quantize(i)
            self._layer = i

    def _prove_source(self) -> None:
        """Reads all of it, so that no damage is found after hours of work."""
        for leaf, spec in self.source.specs.items() if not self._is_proved else ():
            self._heed()
            self._say(f"reading {leaf}")
            for chunk in chunks_of(leaf, spec.shape):
                self._read(chunk)
        self._is_proved = True

    def _pass(self, layer: int, matrices: NewMatrices | OldMatrices) -> LayerPass:
        path = f"layers.{layer}."
        norms = {
            name: self._read(Chunk(f"{path}{name}.weight", None)).astype(np.float32)
            for name in ("attention_norm", "moe_norm")
        }
        router = self._read(Chunk(f"{path}moe.router.weight", None)).astype(np.float32)
        return LayerPass(
            layer=layer,
            config=self._config,
            batches=self._batches,
            others=LayerInput(norms, router),
            matrices=matrices,
            all_tokens=self._recipe.all_token_hessians,
            say=self._say,
        )

    def _quantize(self, layer: int) -> None:
        made = NewMatrices(self._read, self._recipe, self._heed, self._note)
        work = self._pass(layer, made)
        tokens = work.run(self._hidden)
        self._parts = made.parts
        self.errors |= made.errors
        few = tuple(e for e, count in enumerate(tokens) if count < work.threshold)
        report = LayerReport(
            layer=layer,
            tokens=tokens,
            few_tokens=few,
            threshold=work.threshold,
            outputs=made.outputs,
        )
        self.reports[layer] = report
        self._note(told(report))

    def _heed(self) -> None:
        if self._stop():
            raise interrupted()

    def _weights_written(self, layer: int) -> dict[str, QTensor]:
        """The quantized weights of a layer that an earlier run wrote; none if it did not."""
        parts: dict[str, dict[str, np.ndarray]] = {}
        for path in self.specs:
            part = split_path(path)
            if part is None or not path.startswith(f"layers.{layer}."):
                continue
            if not (self._written / WEIGHTS / path).is_dir():
                return {}
            # numpy, and not the arrays that Orbax may place on a device
            value = np.asarray(read_leaf(self._written, path))
            parts.setdefault(part.weight, {})[part.part] = value
        scheme = self._recipe.scheme
        return {weight: join(scheme, found, np.float32) for weight, found in parts.items()}

    def _read(self, chunk: Chunk) -> np.ndarray:
        """A chunk of the source, whole, proved against its digest if there is one."""
        value = read_chunk(self.source, chunk)
        if not all_finite(value):
            raise not_finite(self.source.source_name(chunk))
        return value


def _layer_of(leaf: str) -> int:
    return int(leaf.split(".")[1])
