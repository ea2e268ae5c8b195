"""Quantizes straight to the published GPTQ layout, for every other tool.

The work goes on in a folder of ours beside the destination, so that it is resumed like any other;
that folder is then written out and removed.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from mixtral_jax.convert.driver import convert
from mixtral_jax.convert.options import ConvertOptions
from mixtral_jax.convert.preflight import check_absent
from mixtral_jax.errors import OUTPUT_EXISTS, MixtralError
from mixtral_jax.quantize.driver import QuantizeReport

SUFFIX = ".quantized"
# Schemes whose codes the layout has.
SCHEMES = ("gptq", "rtn", "int4")


def published(
    dst: str | Path,
    quantize: Callable[[Path], QuantizeReport],
    *,
    note: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] = lambda: False,
) -> QuantizeReport:
    """Quantizes to ``DST.quantized`` and writes that as ``dst``.

    Args:
        dst: the folder to make; it is absent until all is written.
        quantize: makes a folder of ours.
        note: as for ``convert``.
        stop: as for ``convert``.

    Returns:
        The report of ``quantize``; its bytes are those of the folder of ours.

    Raises:
        MixtralError: as ``quantize`` and ``export_gptq``; exit code 73 before any work if ``dst``
            exists.
    """
    dst = Path(os.path.abspath(dst))
    between = Path(f"{dst}{SUFFIX}")
    try:
        check_absent(dst)
    except MixtralError as error:
        if error.code != OUTPUT_EXISTS or not between.exists():
            raise
        line = f"{error} (if it is whole, {between} is of no more use)"
        raise MixtralError(line, code=error.code) from None
    report = quantize(between)
    exported = convert(between, dst, ConvertOptions(format="gptq"), note=note, stop=stop)
    shutil.rmtree(between)
    seconds = report.converted.seconds + exported.seconds
    converted = dataclasses.replace(report.converted, seconds=seconds)
    return dataclasses.replace(report, converted=converted)
