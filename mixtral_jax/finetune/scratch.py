"""``--from-scratch``: a model of random weights, from a folder's config and tokenizer alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mixtral_jax.config import CONFIG_NAME, NATIVE_NAME, read_config
from mixtral_jax.convert.hub import EMBEDDED, EMBEDDED_FOLDER
from mixtral_jax.convert.orbax_leaves import WEIGHTS
from mixtral_jax.errors import INPUT_NOT_FOUND, MixtralError
from mixtral_jax.kernels.table import KERNELS, kernels_for
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.load_options import LoadOptions
from mixtral_jax.model.transformer import assemble, num_parameters
from mixtral_jax.sharding import hosts
from mixtral_jax.sharding.agreement import Facts, file_facts, option_facts
from mixtral_jax.sharding.fresh import fresh_leaves
from mixtral_jax.sharding.mesh import MeshSpec, fitted_spec
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.sharding.strategy import Strategy
from mixtral_jax.tokenizer import Tokenizer, find_tokenizer


def scratch_folder(name: str) -> Path:
    """The folder of a config and a tokenizer; nothing is fetched from the Hub for them.

    Raises:
        MixtralError: exit code 66 if there is no such folder.
    """
    folder = EMBEDDED_FOLDER if name == EMBEDDED else Path(name)
    if not folder.is_dir():
        fix = f"name a folder that holds {CONFIG_NAME} and a tokenizer; weights are not needed"
        raise MixtralError(f"--from-scratch: no such folder: {name}", fix=fix, code=INPUT_NOT_FOUND)
    return folder


def scratch_facts(folder: Path) -> Facts:
    """What training from scratch takes out of a folder, to be told apart by."""
    tokenizer = find_tokenizer(folder)
    names = {CONFIG_NAME, NATIVE_NAME} | ({tokenizer.name} if tokenizer else set())
    return {n: f for n, f in file_facts(folder).items() if n.removeprefix("the file ") in names}


def fresh_model(
    folder: Path,
    asked: LoadOptions,
    *,
    seed: int,
    fsdp: bool = False,
    note: Callable[[str], None] = lambda line: None,
) -> LanguageModel:
    """As ``load``, with weights drawn from a seed where ``load`` reads them.

    Args:
        folder: of config.json and the tokenizer; weights in it are not read.
        asked: mesh, dtype (that of the config, if None), dispatch, kernels.
        seed: of the weights.
        fsdp: they lie over the axis data too, as those that train do.
        note: called with one line about what is begun with.

    Raises:
        MixtralError: as ``load``.
    """
    config = read_config(folder, sliding_window=asked.sliding_window, note=note)
    hosts.agree("from scratch", lambda: {**option_facts(asked), **scratch_facts(folder)})
    wanted = None if asked.mesh is None else MeshSpec.parse(asked.mesh)
    spec = fitted_spec(wanted, config, note)
    strategy = Strategy(attention=asked.attention, fsdp=fsdp)
    strategy.check(config, spec)
    mesh = spec.build()
    kernels = asked.kernels or kernels_for(mesh.devices.flat[0].platform)
    ignored = f"; the weights in {folder} are not read" if _has_weights(folder) else ""
    count = f"{num_parameters(config):,} random weights from --seed {seed}"
    note(f"{count}, of a standard deviation of {config.initializer_range:g}{ignored}")
    leaves = fresh_leaves(
        config,
        seed,
        mesh=mesh,
        dtype=asked.dtype or config.dtype,
        layout=KERNELS[kernels].layout,
        strategy=strategy,
    )
    hosts.barrier("weights were drawn")
    return LanguageModel(
        assemble(config, leaves),
        tokenizer=Tokenizer.from_folder(folder),
        placement=MeshPlacement(mesh, asked.dispatch_options(), kernels, strategy),
        spec=spec,
        kv_dtype=asked.kv_dtype,
        folder=folder,
        note=note,
    )


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or (folder / WEIGHTS).is_dir()
