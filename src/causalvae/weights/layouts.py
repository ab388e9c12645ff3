"""Where trainers put weights in their files: which table, which prefix, averaged or not, and the critic."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from causalvae.errors import WeightsError
from causalvae.weights.tensorfiles import printable

Tensors = dict[str, Tensor]
Choice = Literal["ema", "live"]

LIVE, AVERAGED, CRITIC = (
    ("gen_model", "vae", "model"),
    ("ema_state_dict", "ema"),
    ("dics_model", "discriminator"),
)
PREFIXES = ("vae.", "autoencoder.", "_backbone.", "module.", "_orig_mod.", "first_stage_model.")
BUNDLES = ("first_stage_model.", "vae.", "autoencoder.")  # the autoencoder's entries among those of others
OWN = ("encoder.", "decoder.")
LOSS = ("loss.", "discriminator.", "disc.")
EXTRA_NAMES = frozenset(
    {
        "epoch_num", "cur_step", "loss_scale", "current_iterator_step", "last_overflow_iterator_step",
        "global_step", "learning_rate", "beta1_power", "beta2_power", "scale_sense",
    }
)  # fmt: skip
EXTRA_PREFIXES = ("moment1.", "moment2.", "adam_m.", "adam_v.", "swap.", "accum.", "optimizer.")
FLAT_AVERAGES = ("ema.", "model_ema.")


@dataclass(frozen=True)
class Chosen:
    """A file's weights of one set, the critic's, and which set it is. layout: whose, if the tables tell."""

    tensors: Tensors
    discriminator: Tensors
    chosen: Literal["ema", "live", "only"]
    layout: str | None
    notes: tuple[str, ...]


def choose(table: Mapping[Any, Any], path: Path, *, prefer: Choice) -> Chosen:  # Any: whatever a file holds
    """The weights in a file's tables. WeightsError if there are none."""
    levels = [table]
    if isinstance(table.get("state_dict"), dict):
        levels.append(_plain(table["state_dict"]))
    named = _nested(levels, LIVE)
    averaged, critic = _nested(levels, AVERAGED), _nested(levels, CRITIC)
    live = named or ({} if averaged and len(levels) == 1 else _tensors(levels[-1]))
    layout = None
    if named and len(levels) == 2:
        layout = "open-sora-plan"
    elif "pytorch-lightning_version" in table:
        layout = "lightning"
    flat = split(live)
    loss = flat.loss | _stripped(critic)
    averaged = _model(averaged) or _flat_averages(flat)
    if not flat.model and not averaged:
        shown = ", ".join(printable(str(key)) for key in list(table)[:3])
        raise WeightsError(f"{path}: holds no weights of an autoencoder; its entries are {shown or 'none'}")
    return _of_both(flat, averaged, loss, layout=layout, prefer=prefer)


@dataclass(frozen=True)
class Split:
    """The entries of one table: the model's, the loss's and critic's, averages. notes: what was left out."""

    model: Tensors
    loss: Tensors
    averages: Tensors
    notes: tuple[str, ...]


def split(tensors: Tensors) -> Split:
    """Part a table by its names, and take off the prefixes that wrappers put before all names."""
    kept = {n: t for n, t in tensors.items() if n not in EXTRA_NAMES and not n.startswith(EXTRA_PREFIXES)}
    averages = {n: t for n, t in kept.items() if n.startswith(FLAT_AVERAGES)}
    kept = _stripped({n: t for n, t in kept.items() if n not in averages})
    loss = {n: t for n, t in kept.items() if n.startswith(LOSS)}
    model, notes = _unbundled({n: t for n, t in kept.items() if n not in loss})
    loss = {name.removeprefix("loss."): tensor for name, tensor in loss.items()}
    return Split(_stripped(model), loss, averages, notes)


def _of_both(flat: Split, averaged: Tensors, loss: Tensors, *, layout: str | None, prefer: Choice) -> Chosen:
    """The preferred set of those there are. Averages have no buffers: the live set's are taken."""
    notes = flat.notes
    fits = bool(averaged) and (not flat.model or averaged.keys() <= flat.model.keys())
    if averaged and not fits:
        strange = next(name for name in averaged if name not in flat.model)
        notes = (
            *notes,
            f"the averaged weights are of another model ({printable(strange)}), so they were not used",
        )
    if fits and (prefer == "ema" or not flat.model):
        return Chosen(flat.model | averaged, loss, "ema" if flat.model else "only", layout, notes)
    return Chosen(flat.model, loss, "live" if fits else "only", layout, notes)


def _nested(levels: list[Mapping[Any, Any]], names: tuple[str, ...]) -> Tensors:  # Any: whatever a file holds
    """Tensors of the first table of one of these names that has any."""
    for level in reversed(levels):
        for name in names:
            if isinstance(level.get(name), dict) and (found := _tensors(_plain(level[name]))):
                return found
    return {}


def _plain(table: dict[Any, Any]) -> dict[Any, Any]:  # Any: whatever a file holds
    """A dict of no special kind: a file may hang attributes on others, in the place of their methods."""
    return dict(dict.items(table))


def _tensors(table: Mapping[Any, Any]) -> Tensors:  # Any: whatever a file holds
    return {key: value for key, value in table.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _model(tensors: Tensors) -> Tensors:
    return split(tensors).model


def _flat_averages(flat: Split) -> Tensors:
    """Averages that stand beside the weights in one table; some trainers leave the dots of names out."""
    dotless = {name.replace(".", ""): name for name in flat.model}
    found: Tensors = {}
    for name, tensor in flat.averages.items():
        inner = name.removeprefix("model_ema.")
        if inner != name:
            inner = dotless.get(inner, "")
        else:
            inner = name.removeprefix("ema.")
        if inner:
            found[inner] = tensor
    return _model(found)


def _unbundled(tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """The autoencoder's entries of a file of a whole system, and a note of how many others there are."""
    if any(name.startswith(OWN) for name in tensors):
        return tensors, ()
    for prefix in BUNDLES:
        inside = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if inside and len(inside) < len(tensors):
            return inside, (f"{len(tensors) - len(inside)} tensors outside {prefix[:-1]} were left out",)
    return tensors, ()


def _stripped(tensors: Tensors) -> Tensors:
    """Without the prefixes that all names have."""
    while tensors:
        common = [prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in tensors)]
        if not common:
            break
        tensors = {name.removeprefix(common[0]): tensor for name, tensor in tensors.items()}
    return tensors
