"""The flags of other trainers of causal video VAEs: what each is called here, or why it has no counterpart.

Names and meanings are those of Open-Sora-Plan v1.0 to v1.5 (`train_causalvae.py`), of the flags that its
other trainers share with diffusers' examples, and of mindone's opensora_pku. Reasons are in
`lang/foreign.*.yaml`, by the keys that stand here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from causalvae.config import TrainSettings
from causalvae.errors import ConfigError
from causalvae.flags import flags_of, parse, printable

TRUE, FALSE = "true", "false"  # of a value; a flag without one is true
OTHER_WORDS = {"1": TRUE, "yes": TRUE, "0": FALSE, "no": FALSE}
STATE_ENDINGS = (".ckpt", ".pt", ".pth", ".bin")  # of files that hold the state of another trainer

# The same meaning under another name.
RENAMED = {
    "lr": "start_learning_rate",
    "learning_rate": "start_learning_rate",
    "num_frames": "video_num_frames",
    "ckpt_dir": "output_dir",
    "save_ckpt_step": "save_steps",
    "checkpointing_steps": "save_steps",
    "ckpt_max_keep": "keep_checkpoints",
    "checkpoints_total_limit": "keep_checkpoints",
    "max_train_steps": "max_steps",
    "train_batch_size": "batch_size",
    "dataset_num_worker": "dataloader_num_workers",
    "num_workers": "dataloader_num_workers",
    "num_parallel_workers": "dataloader_num_workers",
    "mix_precision": "precision",
    "pretrained_model_name_or_path": "load_from_checkpoint",
    "ignore_mismatched_sizes": "partial",
    "ema": "use_ema",
    "log_interval": "log_steps",
    "scale_window": "loss_scale_window",
    "c": "config",
}
# The same meaning in other words: our flag, and our word for each of theirs, in small letters.
REWORDED: dict[str, tuple[str, Mapping[str, str]]] = {
    "freeze_encoder": ("train_parts", {TRUE: "decoder", FALSE: "all"}),
    "random_crop": ("crop", {TRUE: "random", FALSE: "center"}),
    "mixed_precision": ("precision", {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}),
    "use_discriminator": ("disc_type", {FALSE: "none"}),
    "resume_from_checkpoint": ("resume", {TRUE: "auto", FALSE: "never"}),
    "disc_cls": ("disc_type", {}),
}


@dataclass(frozen=True)
class Gone:
    """A flag that has no counterpart. why: a key of the texts. same: values that change nothing here."""

    why: str
    same: tuple[str, ...] = ()


GONE: dict[str, Gone] = {
    **dict.fromkeys(("epochs", "num_train_epochs"), Gone("epochs")),
    **dict.fromkeys(("ckpt_save_interval", "step_mode"), Gone("save-interval")),
    **dict.fromkeys(
        ("eval_num_frames", "eval_resolution", "eval_sample_rate", "eval_batch_size", "eval_subset_size",
         "eval_num_video_log", "eval_lpips", "eval_psnr", "validate", "val_interval", "val_batch_size"),
        Gone("evaluation", (FALSE,)),
    ),
    **dict.fromkeys(
        ("n_nodes", "devices", "use_parallel", "parallel_mode", "sp_size", "zero_stage",
         "find_unused_parameters"),
        Gone("one-process", (FALSE, "1", "data")),
    ),
    **dict.fromkeys(
        ("enable_dvm", "global_bf16", "mempool_block_size", "enable_flash_attention", "max_rowsize",
         "optim_eps", "ae", "clip_grad_norm"),
        Gone("unused-there"),
    ),
    **dict.fromkeys(
        ("dataset_sink_mode", "sink_size", "jit_syntax_level", "profile", "profile_memory", "log_level"),
        Gone("mindspore", (FALSE, "-1", "logging.info")),
    ),
    **dict.fromkeys(("wavelet_loss", "wavelet_weight"), Gone("wavelet", (FALSE, "0", "0.0"))),
    **dict.fromkeys(("gen_wd", "disc_wd"), Gone("two-decays")),
    **dict.fromkeys(("use_recompute", "gradient_checkpointing"), Gone("recompute")),
    **dict.fromkeys(("data_file_path", "video_column"), Gone("list", ("video",))),
    **dict.fromkeys(("ema_start_step", "ema_offload", "save_ema_only"), Gone("ema", (FALSE, "0"))),
    "use_discriminator": Gone("critic", (TRUE,)),
    "disc_cls": Gone("critic-class"),
    "max_device_memory": Gone("device-memory"),
    "model_name": Gone("model-name"),
    "dynamic_sample": Gone("dynamic-sample", (FALSE,)),
    "scale_lr": Gone("scale-lr", (FALSE,)),
    "drop_overflow_update": Gone("drop-overflow", (TRUE,)),
    "loss_scaler_type": Gone("static-scale", ("dynamic",)),
    "loss_scale_factor": Gone("scale-factor", ("2", "2.0")),
    "vae_keep_gn_fp32": Gone("norms", (TRUE,)),
    "group_strategy": Gone("decay-groups", ("norm_and_bias",)),
    "save_training_resume": Gone("always-saved", (TRUE,)),
    "not_resume_training_process": Gone("weights-only"),
    "load_disc_from_checkpoint": Gone("critic-weights"),
    "resume_from_checkpoint": Gone("other-state"),
}  # fmt: skip
# Words that our own flags have elsewhere and not here.
VALUES: dict[tuple[str, str], str] = {
    ("lr_scheduler", "polynomial_decay"): "polynomial",
    ("lr_scheduler", "multi_step_decay"): "other-schedule",
    ("lr_scheduler", "cosine_annealing_warm_restarts_lr"): "other-schedule",
    ("optim", "momentum"): "momentum",
    ("optim", "adamw_re"): "adamw-re",
    ("device", "ascend"): "ascend",
}


@dataclass(frozen=True)
class Piece:
    """A flag and its values: `--lr 1e-4`. name: with _ and without dashes, "" for none. raw: as typed."""

    typed: str
    name: str
    words: tuple[str, ...]
    raw: tuple[str, ...]

    def __str__(self) -> str:
        """On one line, fit to be shown."""
        return printable(" ".join(self.raw))


@dataclass(frozen=True)
class Turned:
    """What became of a foreign flag. why: a key of the texts. name, words: ours, if it has a counterpart."""

    kind: Literal["renamed", "dropped", "refused"]
    why: str
    name: str = ""
    words: tuple[str, ...] = ()


def pieces(argv: Sequence[str]) -> list[Piece]:
    """A command line cut at its flags. Words in front of the first flag are a piece without a name."""
    found: list[Piece] = []
    for word in argv:
        if re.match(r"--\w|-[a-z]$", word):
            typed, equals, value = word.partition("=")
            name = typed.lstrip("-").replace("-", "_")
            found.append(Piece(typed, name, (value,) if equals else (), (word,)))
        elif found:
            last = found.pop()
            found.append(Piece(last.typed, last.name, (*last.words, word), (*last.raw, word)))
        else:
            found.append(Piece("", "", (word,), (word,)))
    return found


def turned(name: str, words: Sequence[str]) -> Turned | None:
    """What a flag of another trainer, or another trainer's word for a flag of ours, is here; None if ours."""
    value = " ".join(words).lower() if words else TRUE
    if name in flags_of(TrainSettings):
        why = VALUES.get((name, value))
        return None if why is None else Turned("refused", why)
    if name in RENAMED:
        return Turned("renamed", "renamed", RENAMED[name], tuple(words) or ("True",))
    if name in REWORDED:
        ours, known = REWORDED[name]
        word = known.get(value) or known.get(OTHER_WORDS.get(value, "")) or _by_content(name, " ".join(words))
        if word is not None:
            return Turned("renamed", "renamed", ours, (word,))
    if name in GONE:
        same = {value, OTHER_WORDS.get(value)} & set(GONE[name].same)
        return Turned("dropped" if same else "refused", GONE[name].why)
    return None


def _by_content(name: str, value: str) -> str | None:
    """Our word for a class of a critic, and for the path of a checkpoint unless it is another trainer's."""
    if name == "disc_cls" and value.rsplit(".", 1)[-1].startswith("LPIPSWithDiscriminator"):
        return "patchgan3d" if value.endswith("3D") else "patchgan2d"
    if name == "resume_from_checkpoint" and not value.lower().endswith(STATE_ENDINGS):
        return value
    return None


def translate(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A training command with foreign flags in our words, and a note for each of them.

    ConfigError for one that has no counterpart, and for a value given under two names that differs.
    """
    found = pieces(argv)
    foreign = [turned(piece.name, piece.words) if piece.name else None for piece in found]
    if not any(foreign):
        return list(argv), []
    from causalvae.texts import texts  # late: yaml takes 20 ms, and most commands have no foreign flag

    says = texts("foreign", "en")
    words: list[str] = []
    notes: list[str] = []
    for piece, ours in zip(found, foreign, strict=True):
        if ours is None:
            words += piece.raw
        elif ours.kind == "refused":
            raise ConfigError(f"{piece}: {says[ours.why]}")
        elif ours.kind == "dropped":
            notes.append(says["dropped"].format(theirs=piece))
        else:
            words += [f"--{ours.name}", *ours.words]
            notes.append(says["renamed"].format(theirs=piece, ours=printable(in_words(ours))))
    _refuse_contradictions(found, foreign)
    return words, notes


def in_words(ours: Turned) -> str:
    """A translated flag as it is written here."""
    return " ".join((f"--{ours.name}", *ours.words))


def _refuse_contradictions(found: Sequence[Piece], foreign: Sequence[Turned | None]) -> None:
    """ConfigError if a flag is given under two names with different values."""
    flags = flags_of(TrainSettings)
    first: dict[str, tuple[Piece, object]] = {}
    for piece, ours in zip(found, foreign, strict=True):
        name = piece.name if ours is None else ours.name
        if name not in flags or (ours is not None and ours.kind != "renamed"):
            continue
        value = parse(flags[name], (piece.words if ours is None else ours.words) or ("True",))
        before, known = first.setdefault(name, (piece, value))
        if before.name != piece.name and known != value:
            raise ConfigError(contradiction(before, piece, name))


def contradiction(one: Piece, other: Piece, name: str) -> str:
    """What to say of two names for one flag that were given different values."""
    return f"{one} and {other} both mean --{name} here, and differ; keep one of the two"
