"""From a checkpoint to a folder that runs without this package.

The folder is absent until all of it is written. Programs for a further platform join it where the
weights are the same; export.json, which names every file and its digest, is replaced last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mixtral_jax
from mixtral_jax.config import config_to_dict, read_config
from mixtral_jax.convert.hub import EMBEDDED, resolve
from mixtral_jax.convert.leaves import Leaves, open_leaves
from mixtral_jax.convert.load import one_dtype
from mixtral_jax.convert.manifest import file_sha256, fold, sync_folder, write_durably
from mixtral_jax.convert.memory import PeakMemory
from mixtral_jax.convert.output import new_folder
from mixtral_jax.convert.preflight import check_absent, check_destination
from mixtral_jax.errors import BAD_CONFIG, BAD_DATA, OUTPUT_EXISTS, MixtralError, interrupted
from mixtral_jax.export.options import ExportOptions, ExportReport, Sizes
from mixtral_jax.export.programs import Program, Programs
from mixtral_jax.export.weights import Form, Reading, WeightFiles
from mixtral_jax.json_file import read_json
from mixtral_jax.kernels.table import cache_dtype, kernels_for
from mixtral_jax.model.transformer import leaf_specs
from mixtral_jax.quantize.load import quantizing, report
from mixtral_jax.sharding.dispatch import DispatchOptions
from mixtral_jax.sharding.mesh import AXES, MeshSpec, simulate_on_cpu
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.tokenizer import find_tokenizer

NAME = "export.json"
VERSION = 1
LOADER = Path(__file__).parent / "run.py"
MAX_JSON_BYTES = 64 << 20

Note = Callable[[str], None]


def export(
    checkpoint: str | Path,
    dst: str | Path,
    options: ExportOptions,
    *,
    note: Note = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> ExportReport:
    """Writes ``dst``: programs for one platform, weights, tokenizer and loader.

    Where ``dst`` is such a folder of the same weights, the platform's programs join it. The
    checkpoint is then read, not written: its digest must be that of the folder.

    Args:
        checkpoint: as for ``mj.load``.
        dst: the folder to make or to add to.
        options: platform and sizes.
        note: called with one line for each thing a person should know.
        progress: called with bytes of weights done, and in all.
        stop: asked before each leaf; True ends the work there, and nothing of it is left.

    Raises:
        MixtralError: exit codes 64 (sizes), 65 (bad data), 66 (no checkpoint), 73 (``dst`` is not
            ours, is of other weights, or has programs for the platform), 74 (disk), 75 (stopped),
            78 (a mesh that does not fit, or no flatbuffers).
    """
    if importlib.util.find_spec("flatbuffers") is None:
        fix = "pip install 'mixtral-jax[export]'"
        raise MixtralError("export needs flatbuffers", fix=fix, code=BAD_CONFIG)
    started, dst = time.monotonic(), Path(os.path.abspath(dst))
    folder = resolve(checkpoint, note).folder
    check_destination(dst, folder)
    is_addition = (dst / NAME).is_file()
    if not is_addition:
        check_absent(dst)
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(PeakMemory())
        if is_addition:
            stack.enter_context(_locked(dst))
        work = Work(checkpoint, folder, options, note)
        stack.callback(work.leaves.close)
        about = work.read_existing(dst) if is_addition else None
        made = work.programs.serialize(options.platform)
        work.name_files(made, about)
        work.tell_unstable(made)
        values = _watched(work.reading, work.files, progress, stop)
        if about is None:
            num_bytes = work.files.num_bytes + sum(len(p.content) for p in made.values())
            with new_folder(dst, num_bytes) as new:
                _write(new, work.about(work.files.write(new, values)), work, made)
        else:
            for _ in values:
                pass
            work.check_same_weights(about, dst)
            _write(dst, about, work, made)
    return ExportReport(
        platform=options.platform,
        kernels=work.kernels,
        mesh=str(work.mesh),
        program_bytes={work.file_name(name): len(p.content) for name, p in made.items()},
        weight_bytes=work.files.num_bytes,
        digest=fold(work.reading.records),
        seconds=time.monotonic() - started,
        peak_rss_bytes=memory.bytes,
    )


class Work:
    """An export under way: an open checkpoint, and what will be made of it.

    Raises:
        MixtralError: as ``export``.
    """

    def __init__(self, checkpoint: str | Path, folder: Path, options: ExportOptions, note: Note):
        self.options, self.folder, self.note = options, folder, note
        self.config = read_config(folder, sliding_window=options.sliding_window, note=note)
        self.mesh = MeshSpec.parse(options.mesh).fit(self.config)
        simulate_on_cpu(self.mesh, lambda line: None)  # nothing runs: programs are lowered for it
        self.sizes: Sizes = options.sizes(self.config, self.mesh)
        self.kernels = options.kernels or kernels_for(options.platform)
        self._files: dict[str, str] = {}
        self.tell_foreign()
        placement = MeshPlacement(self.mesh.build(), DispatchOptions(), self.kernels)
        specs = leaf_specs(self.config)
        opened = open_leaves(folder, specs, head_dim=self.config.head_dim, note=note)
        try:
            self.leaves: Leaves = quantizing(options.quantize, verify=True)(opened)
            asked = options.dtype or ("float32" if str(checkpoint) == EMBEDDED else None)
            self.dtype = asked or one_dtype(self.leaves, specs, self.config.dtype, note)
            self.programs = Programs(
                config=self.config,
                sizes=self.sizes,
                specs=self.leaves.specs,
                dtype=self.dtype,
                cache_dtype=cache_dtype(self.kernels, options.kv_dtype, jnp.dtype(self.dtype)),
                placement=placement,
            )
            plain = {p: jax.ShapeDtypeStruct(s.shape, self.dtype) for p, s in specs.items()}
            report(plain | self.programs.quantized, specs, options.quantize, note)
        except BaseException:
            opened.close()
            raise
        dtypes = {x.leaf: np.dtype(x.shape.dtype) for x in self.programs.weights}
        forms = {leaf: Form(spec.shape, dtypes[leaf]) for leaf, spec in self.leaves.specs.items()}
        self.files = WeightFiles(forms)
        self.reading = Reading(self.leaves, forms)

    @property
    def backend(self) -> str:
        """What the platform is called by ``jax.default_backend``."""
        return "gpu" if self.options.platform == "cuda" else self.options.platform

    def name_files(self, made: dict[str, Program], about: dict[str, Any] | None) -> None:
        """Chooses the files of programs: none of a folder's own, whose programs run until then."""
        had = {} if about is None else about["sha256"]
        for name, program in made.items():
            digest, plain = _sha256(program.content), f"{name}.{self.options.platform}.bin"
            other = f"{name}.{self.options.platform}.{digest[:8]}.bin"
            self._files[name] = plain if had.get(plain, digest) == digest else other

    def file_name(self, program: str) -> str:
        """Of a serialized program."""
        return self._files[program]

    def tell_foreign(self) -> None:
        """Says where kernels are asked for that were made for another platform."""
        own = kernels_for(self.options.platform)
        if self.kernels in ("visit", "gpu") and self.kernels != own:
            self.note(
                f"kernels {self.kernels} are not those of {self.options.platform}: they may be "
                f"slow there, or not compile; leave out --kernels for {own}"
            )

    def tell_unstable(self, made: dict[str, Program]) -> None:
        """Says where programs hold what another release of jax may not run."""
        if any(program.custom_calls for program in made.values()):
            self.note(
                f"the programs hold Pallas-Triton kernels, which JAX promises to keep for no other "
                f"release: run them with jax {jax.__version__}, or export with --kernels tpu"
            )

    def read_existing(self, dst: Path) -> dict[str, Any]:
        """export.json of the folder that programs are added to, its files proved."""
        about = read_json(dst / NAME, max_bytes=MAX_JSON_BYTES)
        if about.get("version") != VERSION:
            fix = "choose another folder"
            raise MixtralError(
                f"{dst / NAME} version",
                expected=VERSION,
                got=about.get("version"),
                fix=fix,
                code=OUTPUT_EXISTS,
            )
        missing = sorted({"programs", "model", "weights", "tokenizer", "sha256"} - about.keys())
        if missing:
            what, fix = f"{dst / NAME} lacks {', '.join(missing)}", "export to another folder"
            raise MixtralError(what, fix=fix, code=BAD_DATA)
        if self.backend in about["programs"] and not self.options.overwrite:
            raise MixtralError(
                f"{dst} has programs for {self.options.platform}",
                fix="choose another folder, or add --overwrite",
                code=OUTPUT_EXISTS,
            )
        self._check_same_config(about, dst)
        for name in {*self.files.groups, *filter(None, [about["tokenizer"]])} & {*about["sha256"]}:
            path = dst / name
            if not path.is_file() or file_sha256(path) != about["sha256"][name]:
                fix = "export to another folder"
                raise MixtralError(f"{path} is missing or was altered", fix=fix, code=BAD_DATA)
        return about

    def _check_same_config(self, about: dict[str, Any], dst: Path) -> None:
        had, own = about["model"], json.loads(json.dumps(config_to_dict(self.config)))
        fields = sorted(k for k in {*had, *own} if had.get(k) != own.get(k))
        if fields:
            shown = fields[:3]  # of all that there are in a config
            raise MixtralError(
                f"{dst} holds a model of another config: it differs in {', '.join(fields)}",
                expected={name: had.get(name) for name in shown},
                got={name: own.get(name) for name in shown},
                fix="choose another folder",
                code=OUTPUT_EXISTS,
            )

    def check_same_weights(self, about: dict[str, Any], dst: Path) -> None:
        """Refuses to add programs to weights that are not those that were read."""
        expected, got = about["weights"]["digest"], fold(self.reading.records)
        if expected != got:
            raise MixtralError(
                f"{dst} holds other weights, or the same in another form: digest",
                expected=expected,
                got=got,
                fix="choose another folder, or the --dtype and --quantize of that export",
                code=OUTPUT_EXISTS,
            )

    def about(self, digests: dict[str, str]) -> dict[str, Any]:
        """export.json but for programs; ``digests`` are those of the files of weights."""
        tokenizer = find_tokenizer(self.folder)
        return {
            "version": VERSION,
            "model": config_to_dict(self.config),
            "vocab_size": self.config.vocab_size,
            "bos_token_id": self.config.bos_token_id,
            "eos_token_ids": list(self.config.eos_token_ids),
            "tokenizer": None if tokenizer is None else tokenizer.name,
            "weights": {
                "digest": fold(self.reading.records),
                "dtype": self.dtype,
                "bytes": self.files.num_bytes,
            },
            "programs": {},
            "sha256": digests,
        }

    def describe(self, made: dict[str, Program], about: dict[str, Any]) -> dict[str, Any]:
        """The entry of ``programs`` in export.json: all that the loader reads."""
        programs = self.programs
        files = [self.file_name(name) for name in made]
        read = {*files, *self.files.groups, *filter(None, [about["tokenizer"]])}
        return {
            "platform": self.options.platform,
            "files": files,
            "written_by": {"mixtral_jax": mixtral_jax.__version__, "jax": jax.__version__},
            "calling_convention": max(program.calling_convention for program in made.values()),
            "unstable_custom_calls": sorted({c for p in made.values() for c in p.custom_calls}),
            "kernels": self.kernels,
            "mesh_shape": self.mesh.shape,
            "mesh_axes": AXES,
            **dataclasses.asdict(self.sizes),
            "vocab_size": self.config.vocab_size,
            "tokenizer": about["tokenizer"],
            "sha256": {name: about["sha256"][name] for name in sorted(read)},
            "weights": [
                {"file": self.files.file_of[x.leaf], "tensor": x.leaf, "rows": x.rows}
                | _form(x.shape)
                for x in programs.weights
            ],
            "state": {n: _form(x.shape) | {"value": x.value} for n, x in programs.state.items()},
            "options": {
                n: _form(x.shape) | {"value": x.value} for n, x in programs.options.items()
            },
        }


def _form(shape: jax.ShapeDtypeStruct) -> dict[str, Any]:
    return {"shape": list(shape.shape), "dtype": shape.dtype.name}


def _watched(
    reading: Reading,
    files: WeightFiles,
    progress: Callable[[int, int], None],
    stop: Callable[[], bool],
) -> Iterator[tuple[str, np.ndarray]]:
    done = 0
    for leaf, value in reading:
        if stop():
            raise interrupted()
        yield leaf, value
        done += value.nbytes
        progress(done, files.num_bytes)


def _write(dst: Path, about: dict[str, Any], work: Work, made: dict[str, Program]) -> None:
    """Writes all but the weights, export.json last; each file appears whole.

    Programs that are replaced lie beside the new ones until export.json names these: a process
    that is killed at any time leaves a folder that runs.
    """
    contents = {work.file_name(name): program.content for name, program in made.items()}
    if not about["programs"]:
        contents[LOADER.name] = LOADER.read_bytes()
        if about["tokenizer"] is not None:
            contents[about["tokenizer"]] = (work.folder / about["tokenizer"]).read_bytes()
    replaced = {*about["programs"].get(work.backend, {}).get("files", [])} - contents.keys()
    about["sha256"] = {k: v for k, v in about["sha256"].items() if k not in replaced}
    about["sha256"] |= {name: _sha256(content) for name, content in contents.items()}
    about["programs"][work.backend] = work.describe(made, about)
    contents[NAME] = json.dumps(about, indent=1).encode()
    for name, content in contents.items():
        partial = dst / f".{name}.partial"
        try:
            write_durably(partial, content)
            os.replace(partial, dst / name)
        finally:
            partial.unlink(missing_ok=True)
    sync_folder(dst)
    for name in replaced:
        (dst / name).unlink(missing_ok=True)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def _locked(dst: Path) -> Iterator[None]:
    """Lets one process at a time add to a folder."""
    lock = os.open(dst, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = f"{dst} is being written by another export"
            raise MixtralError(what, fix="wait for it", code=OUTPUT_EXISTS) from None
        yield
    finally:
        os.close(lock)
