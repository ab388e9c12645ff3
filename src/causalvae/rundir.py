"""A run is a folder of plain files that appear whole or not at all (idea 5): lock, checkpoints, records.

A checkpoint is written aside as `.step-N.partial`, synced, given its manifest last and renamed. Opening takes
the run's lock and removes what killed processes left. Only `.partial` files and training state past its time
are ever removed; damaged checkpoints are set aside as `step-N.broken-K`, and those after the step that a
diverged run went back to as `step-N.diverged-K`. What is in a checkpoint is not known
here, but for the names of the files that stay when the rest is pruned.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from safetensors import SafetensorError

from causalvae.errors import ConfigError, RunError
from causalvae.files import Json, append_whole, disk_error, plain, remove, sha256, sync, write_whole
from causalvae.locks import NAME as LOCK
from causalvae.locks import Lock

MANIFEST = "MANIFEST.json"
STATE = "state.json"  # in a full checkpoint; a pruned one has only the weights
WEIGHTS = ("model.safetensors", "ema.safetensors")  # what pruning leaves
STEP_FOLDER = re.compile(r"step-([0-9]{8,})")
RUBBISH = re.compile(r"\..+\.partial")  # what a killed process leaves in the folders of a run
FOLDERS = (".", "checkpoints", "debug", "eval", "samples")


@dataclass(frozen=True)
class Checkpoint:
    """One saved step. full: it has the training state, not the weights alone."""

    step: int
    path: Path
    full: bool


def run_path(output_dir: str, exp_name: str) -> Path:
    """Where the run lives. Raises ConfigError if a link leads it out of output_dir."""
    parent = Path(output_dir).resolve()
    path = (parent / exp_name).resolve()
    if path == parent or not path.is_relative_to(parent):
        raise ConfigError(f"--exp_name {exp_name!r}: leads to {path}, outside of --output_dir {parent}")
    return path


class RunDir:
    """The folder of one run, held by one process at a time. Use it in a `with`, or close() it.

    warnings: what went wrong and did not stop the run; the caller shows and records it.
    was_empty: whether nothing was there when it was opened.
    """

    def __init__(self, path: Path) -> None:
        """Make the folder and take its lock. RunError if it can't be written or another process has it."""
        self.path = path
        self.warnings: list[str] = []
        try:
            self.was_empty = not path.exists() or _is_empty(path)
            self._lock = Lock(path, instead="give another --exp_name")
        except OSError as error:
            raise RunError(
                f"{path}: the run's folder can't be written: {error.strerror}; choose another --output_dir"
            ) from error
        self.warnings += [self._lock.warning] if self._lock.warning is not None else []
        try:
            self._folder.mkdir(exist_ok=True)
            self._clean()
        except OSError as error:
            self.close()
            raise RunError(
                f"{path}: the run's folder can't be used: {error.strerror}; see who owns it and "
                "whether its disk is full"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back."""
        self._lock.close()

    @property
    def _folder(self) -> Path:
        return self.path / "checkpoints"

    def _clean(self) -> None:
        """Remove what killed processes left: partial files and folders, and state that was being pruned."""
        for folder in (self.path / name for name in FOLDERS):
            for item in folder.iterdir() if folder.is_dir() else ():
                if RUBBISH.fullmatch(item.name):
                    remove(item)
        for old in self._folder.glob(".step-*.old"):
            final = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
            if final.exists():
                remove(old)
            else:
                os.rename(old, final)  # killed between two renames
        for checkpoint in self.checkpoints():
            (checkpoint.path / f".{MANIFEST}.partial").unlink(missing_ok=True)
            if not checkpoint.full:
                _remove_listed(checkpoint.path)

    def checkpoints(self) -> list[Checkpoint]:
        """The saved steps, oldest first, pruned ones too; not looked into, so one may be damaged."""
        found: list[Checkpoint] = []
        for item in self._folder.iterdir():
            match = STEP_FOLDER.fullmatch(item.name)
            if match is not None and item.is_dir():
                manifest = _read_manifest(item)
                full = manifest is None or STATE in manifest["files"]  # no manifest: damaged, not pruned
                found.append(Checkpoint(int(match[1]), item, full))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def latest(self) -> Checkpoint | None:
        """The newest full checkpoint whose manifest holds; None if the run has saved nothing.

        Newer ones that are damaged are set aside, with a warning. RunError if there is none to go on from
        though something was saved: a run never starts from zero in silence.
        """
        damaged: list[tuple[Checkpoint, str]] = []
        for checkpoint in reversed([each for each in self.checkpoints() if each.full]):
            reason = damage(checkpoint.path)
            if reason is None:
                for each, why in damaged:
                    aside = _set_aside(each.path)
                    self.warnings.append(
                        f"{each.path}: damaged, {why}; set aside as {aside.name}, "
                        f"going on from step {checkpoint.step}"
                    )
                return checkpoint
            damaged.append((checkpoint, reason))
        if damaged or any(item.name.startswith("step-") for item in self._folder.iterdir()):
            reasons = "; ".join(f"{each.path.name}: {why}" for each, why in damaged) or "only weights remain"
            raise RunError(
                f"{self._folder}: no checkpoint can be resumed ({reasons}). Nothing was changed. Start anew "
                "with another --exp_name, or from saved weights with --load_from_checkpoint"
            )
        return None

    @contextlib.contextmanager
    def stage(self, step: int, *, num_bytes: int = 0) -> Generator[Path]:
        """A folder to save step `step` in, published when the block ends without an error, else removed.

        A complete checkpoint of this step that is already there is kept. A failing disk is a RunError with
        status 1; the caller may try once more. num_bytes: about the size, if known, for that error.
        """
        final = self._folder / f"step-{step:08d}"
        partial = self._folder / f".{final.name}.partial"
        try:
            remove(partial)
            partial.mkdir()
            yield partial
            seal(partial, step)
            self._publish(partial, final)
        except (OSError, SafetensorError) as error:
            failure = disk_error(error, partial, num_bytes=num_bytes or self._last_size())
            if failure is None:
                raise
            raise failure from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _last_size(self) -> int:
        """Bytes of the newest full checkpoint, 0 without one."""
        manifests = [_read_manifest(each.path) for each in self.checkpoints() if each.full]
        newest = manifests[-1] if manifests else None
        return sum(facts["bytes"] for facts in newest["files"].values()) if newest is not None else 0

    def _publish(self, partial: Path, final: Path) -> None:
        """Rename a sealed folder to its name. A rename can't replace a folder that is not empty."""
        if final.exists():
            manifest = _read_manifest(final)
            if damage(final) is not None:
                aside = _set_aside(final)
                self.warnings.append(f"{final}: damaged; set aside as {aside.name}")
            elif manifest is not None and STATE in manifest["files"]:
                return
            else:
                os.rename(final, final.with_name(f".{final.name}.old"))  # pruned: the new one has more
        os.rename(partial, final)
        sync(self._folder)
        remove(final.with_name(f".{final.name}.old"))

    def prune(self, keep: int | None) -> None:
        """Of all but the newest `keep` full checkpoints, keep only the model weights. None keeps everything.

        The new manifest replaces the old one in one rename, so the folder is valid at any moment. Files that
        it no longer lists are removed after that, or when the run is opened next.
        """
        full = [checkpoint for checkpoint in self.checkpoints() if checkpoint.full]
        for checkpoint in full[: max(0, len(full) - keep)] if keep is not None else []:
            try:
                _prune(checkpoint)
            except OSError as error:
                self._warn_once(f"{checkpoint.path}: can't be pruned, {error.strerror}; training goes on")

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints of later steps to `NAME.diverged-K`: the run went back and saves them anew."""
        for checkpoint in self.checkpoints():
            if checkpoint.step > step:
                try:
                    _set_aside(checkpoint.path, "diverged")
                except OSError as error:
                    raise disk_error(error, checkpoint.path) or error from error

    def _warn_once(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    def append(self, name: str, record: Json) -> None:
        """Add one line of JSON to a file, in ASCII so that names that are not text fit in."""
        self.append_text(name, json.dumps(plain(record)) + "\n")

    def append_text(self, name: str, text: str) -> None:
        """Add text to a file. A failing disk is one warning and no error: logs stop nothing."""
        try:
            append_whole(self.path / name, text.encode(errors="backslashreplace"))
        except OSError as error:
            self._warn_once(f"{self.path / name}: lines are missing, {error.strerror}; training goes on")

    def records(self, name: str) -> list[dict[str, Any]]:  # Any: JSON values nest
        """The whole records of a file of JSON lines; none if there is no such file."""
        path = self.path / name
        lines = path.read_bytes().splitlines() if path.exists() else []
        found: list[dict[str, Any]] = []
        for line in lines:
            with contextlib.suppress(ValueError):  # a line that a kill cut off
                found.append(cast("dict[str, Any]", json.loads(line)))
        return found

    def rewind(self, name: str, step: int) -> None:
        """Drop the records of later steps and a torn last line, so that a resumed run repeats nothing."""
        path = self.path / name
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith(b"\n") and _is_up_to(line, step)]
        if len(kept) < len(lines):
            self.write_text(name, b"".join(kept).decode())

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the run, whole or not at all."""
        try:
            write_whole(self.path / name, text)
        except OSError as error:
            raise disk_error(error, self.path / name) or error from error

    def write_json(self, name: str, value: Json) -> None:
        """Write a file of the run as JSON, whole or not at all."""
        self.write_text(name, json.dumps(plain(value), indent=2) + "\n")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: a file and why; None if the manifest holds. Reads every byte."""
    manifest = _read_manifest(folder)
    if manifest is None:
        return f"{MANIFEST} is missing or can't be read"
    for name, facts in manifest["files"].items():
        try:
            size, digest = (folder / name).stat().st_size, None
            if size == facts["bytes"]:
                digest = sha256(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if size != facts["bytes"]:
            return f"{name} has {size} bytes instead of {facts['bytes']}"
        if digest != facts["sha256"]:
            return f"{name} has another checksum than when it was saved"
    return None


def _is_empty(path: Path) -> bool:
    """Whether a run's folder has nothing in it but what opening it makes."""
    made = [item for item in path.iterdir() if item.name != LOCK]
    return all(item.name == "checkpoints" and not any(item.iterdir()) for item in made)


def seal(folder: Path, step: int) -> None:
    """Sync every file, give it the mode that the umask asks for, and write the manifest last.

    safetensors makes its files 0600 whatever the umask, so that colleagues could not read them.
    """
    mode = folder.stat().st_mode & 0o666
    files: dict[str, dict[str, int | str]] = {}
    for path in sorted(folder.iterdir()):
        path.chmod(mode)
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_whole(folder / MANIFEST, json.dumps({"step": step, "files": files}, indent=1) + "\n")


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None if there is none that makes sense. Names in it are plain names of files."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = cast("dict[str, Any]", manifest["files"])
        sound = all("/" not in name and {*facts} == {"bytes", "sha256"} for name, facts in files.items())
        return cast("dict[str, Any]", manifest) if sound and files else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _prune(checkpoint: Checkpoint) -> None:
    """Keep only the weights of a full checkpoint; one that has no weights or no manifest is left as it is."""
    manifest = _read_manifest(checkpoint.path)
    kept = {name: facts for name, facts in (manifest or {"files": {}})["files"].items() if name in WEIGHTS}
    if manifest is None or not kept:
        return
    removed = sorted(set(manifest["files"]) - set(kept))
    pruned = {"step": checkpoint.step, "files": kept, "removed": removed}
    write_whole(checkpoint.path / MANIFEST, json.dumps(pruned, indent=1) + "\n")
    _remove_listed(checkpoint.path)


def _remove_listed(folder: Path) -> None:
    """Remove the training state that the manifest of a pruned checkpoint lists as removed."""
    manifest = _read_manifest(folder) or {}
    for name in manifest.get("removed", ()):
        if "/" not in str(name) and name not in manifest["files"]:
            (folder / str(name)).unlink(missing_ok=True)
    sync(folder)


def _set_aside(folder: Path, word: str = "broken") -> Path:
    """Rename a checkpoint that is not to be resumed to the next free `NAME.broken-K`."""
    k = 1
    while (aside := folder.with_name(f"{folder.name}.{word}-{k}")).exists():
        k += 1
    os.rename(folder, aside)
    sync(folder.parent)
    return aside


def _is_up_to(line: bytes, step: int) -> bool:
    """Whether a line is a whole record of no later step; records without a step stay."""
    try:
        record = cast("dict[str, Any]", json.loads(line))
        return record.get("step", step) <= step
    except (ValueError, AttributeError, TypeError):
        return False
