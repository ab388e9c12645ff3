"""Which convolutions a CPU computes right in few bits: tried at start, by shape, and remembered.

torch 2.13's kernels for weight gradients of 3D convolutions in bf16 were seen to be wrong by 17 %, or NaN,
for some shapes and thread counts of CPUs with AMX, and for small plain layouts of those with AVX512-BF16
alone; some read memory that nobody wrote, right while it happens to hold zeros. `models.convolution` goes
round those. What it does compute is tried here: every shape of a run against fp32 on the same rounded data,
in memory left full of NaN, and what is more than 1 % off computes in fp32.

A shape is tried as the run has it: batch, frames, height and width, layout in memory, thread count. Where
that would take more than MOST_MACS or MOST_VALUES, first the batch and then the frames are fewer; height,
width and channels never are. A kernel may choose by batch and frames too, so the message counts these.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from causalvae import rng
from causalvae.files import write_whole
from causalvae.geometry import Geometry
from causalvae.models.convolution import Conv, convolution_gradients, convolve
from causalvae.models.layers import FrameConv
from causalvae.video import crop_frames

LARGEST_ERROR = 0.01  # of a norm, relative; rounding to bf16 makes 0.002 to 0.003
MOST_MACS = 5e10  # multiply-adds of one forward pass that is tried: a second on a CPU with bf16
MOST_VALUES = 1 << 25  # in the input or the output of it
MOST_DRAWN = (1 << 20) + 7  # a prime: what is repeated falls on other channels each time
SUMS = 16  # of channels that are compared
TRIES = 2
PIECES_BYTES = [30 << k for k in range(4, 21)]  # glibc maps what is over 32 MiB: zeros, whatever was there
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of axes


@dataclass(frozen=True, kw_only=True)
class ConvShape:
    """All that a kernel is chosen by. x: b c (t) h w. weight: c' c (kt) kh kw. *_last: channels last."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    bias: bool
    x_last: bool
    weight_last: bool

    @property
    def out(self) -> tuple[int, ...]:
        """Sizes of the output: b c' (t) h w."""
        axes = zip(self.x[2:], self.weight[2:], self.stride, self.padding, strict=True)
        return self.x[0], self.weight[0], *((n + 2 * p - k) // s + 1 for n, k, s, p in axes)

    @property
    def text(self) -> str:
        """A name for the cache."""
        sizes = ["x".join(map(str, each)) for each in (self.x, self.weight, self.stride, self.padding)]
        layout = f"{'last' if self.x_last else 'first'}/{'last' if self.weight_last else 'first'}"
        return f"{sizes[0]} by {sizes[1]} stride {sizes[2]} pad {sizes[3]} bias {int(self.bias)} {layout}"

    def affordable(self) -> "ConvShape":
        """This shape, or the nearest one with less of the batch and then of the frames."""
        shape = self
        for axis in (0, 2) if len(self.x) == 5 else (0,):
            least = 1 if axis == 0 else self.weight[2]
            while shape.x[axis] > least and not shape._small_enough():
                fewer = max(least, shape.x[axis] - math.ceil(shape.x[axis] / 8))
                shape = replace(shape, x=(*shape.x[:axis], fewer, *shape.x[axis + 1 :]))
        return shape

    def _small_enough(self) -> bool:
        values, macs = math.prod(self.out), math.prod(self.out) * math.prod(self.weight[1:])
        return macs <= MOST_MACS and max(values, math.prod(self.x)) <= MOST_VALUES


Convolve = Callable[[Tensor, Tensor, Tensor | None, ConvShape], Tensor]


@dataclass(frozen=True)
class Checked:
    """keep: names of convolutions that compute in fp32. message: for the log. notes: warnings.

    kernels: those that were tried, None where none was.
    """

    keep: frozenset[str]
    message: str
    notes: tuple[str, ...] = ()
    kernels: str | None = None


def convolutions(network: nn.Module) -> dict[str, Conv | FrameConv]:
    """Every convolution of a network whose numbers can be chosen, by name."""
    return {name: each for name, each in network.named_modules() if isinstance(each, Conv | FrameConv)}


def check_convolutions(
    shapes: Mapping[str, frozenset[ConvShape]],
    *,
    numbers: torch.dtype,
    cache: Path,
    cpu: str,
    variables: Mapping[str, str],
) -> Checked:
    """Try the shapes that the cache doesn't know, and say which convolutions have one that is wrong.

    shapes: of each convolution, by name. cache: a JSON file, made if it isn't there. cpu: its name.
    variables: the environment, of which ONEDNN_MAX_CPU_ISA chooses kernels.
    """
    started = time.perf_counter()
    where = kernels(numbers, cpu=cpu, variables=variables)
    known, note = _read(cache)
    errors = dict(known.get(where, {}))
    tried = {shape: shape.affordable() for found in shapes.values() for shape in found}
    new = {shape.text: shape for shape in tried.values() if shape.text not in errors}
    for text, shape in sorted(new.items()):
        error = error_of(shape, numbers=numbers)
        errors[text] = error if math.isfinite(error) else None
    notes = [note] if note else []
    if new:
        notes += _write(cache, {**known, where: errors})
    good = {text for text, error in errors.items() if error is not None and error <= LARGEST_ERROR}
    keep = frozenset(
        name for name, found in shapes.items() if not found or any(tried[s].text not in good for s in found)
    )
    fewer = sum(shape != small for shape, small in tried.items())
    message = (
        f"{len(shapes) - len(keep)} of {len(shapes)} convolutions compute in {str(numbers)[6:]}; of "
        f"{len(tried)} shapes {len(new)} were tried in {time.perf_counter() - started:.1f} s"
    )
    return Checked(
        keep,
        message + (f", {fewer} of all on a smaller batch or fewer frames" if fewer else ""),
        tuple(notes),
        kernels=where,
    )


def kernels(numbers: torch.dtype, *, cpu: str, variables: Mapping[str, str]) -> str:
    """What the choice of kernels depends on and how they are tried, in words: the key of the cache."""
    isa = variables.get("ONEDNN_MAX_CPU_ISA", "default")
    where = f"torch {torch.__version__}, {cpu}, isa {isa}, {torch.get_num_threads()} threads"
    return f"{where}, {numbers}, in memory full of NaN"


def error_of(shape: ConvShape, *, numbers: torch.dtype, by: Convolve | None = None) -> float:
    """Largest relative error of output and gradients in `numbers`, against fp32 on the same rounded data.

    NaN or infinite if anything is. by: what is tried in the place of the product's convolution, in memory
    that is full of NaN where nobody wrote, and TRIES times: kernels whose threads race differ by the time.

    fp32 computes sums of channels with random signs, and not each channel by itself: a convolution is linear
    in its weights, so that the sums of what was tried have to be these (Freivalds, 1977). A wrong share of
    the channels is the same share of their sums.
    """
    x, weight, pull = (
        _layout(_values(sizes, name).to(numbers), last=last)
        for name, sizes, last in (
            ("x", shape.x, shape.x_last),
            ("weight", shape.weight, shape.weight_last),
            ("pull", shape.out, shape.x_last or shape.weight_last),
        )
    )
    bias = _values(shape.weight[:1], "bias").to(numbers) if shape.bias else None
    exact = _sums_in_fp32(x, weight, bias, pull, shape)
    leaves = [each.requires_grad_() for each in (x, weight, bias) if each is not None]
    errors: list[float] = []
    for _ in range(TRIES):
        apart = _leave_nan(2 * 4 * max(math.prod(each) for each in (shape.x, shape.out, shape.weight)))
        y = (by or _convolve)(x, weight, bias, shape)
        apart += _leave_nan(apart[-1].nbytes)
        found = y.detach(), *torch.autograd.grad(y, leaves, pull)
        del apart, y
        sums = _sum_channels(found[0], 1), _sum_channels(found[1], 1), _sum_channels(found[2], 0), *found[3:]
        errors += [_relative(low, right) for low, right in zip(sums, exact, strict=True)]
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def _sums_in_fp32(
    x: Tensor, weight: Tensor, bias: Tensor | None, pull: Tensor, shape: ConvShape
) -> list[Tensor]:
    """Sums of the channels of output and of the gradients for x and (over c') weight; that for bias."""
    x, weight, pull = x.float(), weight.float(), pull.float()
    summed = None if bias is None else _sum_channels(bias.float(), 0)
    y = _convolve(x, _sum_channels(weight, 0), summed, shape)
    few_in = _sum_channels(weight, 1)
    sizes = (shape.x[0], few_in.shape[1], *shape.x[2:])
    how = {"stride": shape.stride, "padding": shape.padding}
    dx = convolution_gradients(pull, torch.zeros(sizes), few_in, **how, needs=(True, False, False))[0]
    few_out = _sum_channels(pull, 1)
    like = weight[: few_out.shape[1]]
    dweight = convolution_gradients(few_out, x, like, **how, needs=(False, True, False))[1]
    assert dx is not None
    assert dweight is not None
    axes = [axis for axis in range(pull.ndim) if axis != 1]
    return [y, dx, dweight, *([] if bias is None else [pull.sum(axes)])]


def _sum_channels(tensor: Tensor, axis: int) -> Tensor:
    """SUMS sums along an axis, in fp32, with signs that are its length's own; a short axis as it is."""
    length = tensor.shape[axis]
    if length <= SUMS:
        return tensor.float()
    signs = 2.0 * rng.integers((SUMS, length), n=2, base=rng.key("convolution check", "signs", length)) - 1
    moved = tensor.float().movedim(axis, 0)
    return (signs @ moved.reshape(length, -1)).view(SUMS, *moved.shape[1:]).movedim(0, axis)


def _leave_nan(largest: int) -> list[Tensor]:
    """Fill memory with bytes that are NaN in all numbers, in pieces up to `largest` bytes, and free half.

    What is returned keeps the freed pieces from growing together and from going back to the system.
    """
    sizes = [size for size in PIECES_BYTES if size <= largest] or PIECES_BYTES[:1]
    torch.empty(sizes[-1], dtype=torch.int8)  # freed at once: from then on glibc keeps what is as large
    pieces = [torch.full((size,), -1, dtype=torch.int8) for size in sizes for _ in range(2)]
    return pieces[::2]


def _values(shape: Sequence[int], name: str) -> Tensor:
    """Normal numbers, in fp32; where there are many the same ones again, since drawing takes time."""
    drawn = rng.normal((min(math.prod(shape), MOST_DRAWN),), rng.key("convolution check", name))
    return drawn.repeat(math.ceil(math.prod(shape) / len(drawn)))[: math.prod(shape)].view(*shape)


def _layout(tensor: Tensor, *, last: bool) -> Tensor:
    return tensor.contiguous(memory_format=LAYOUTS[tensor.ndim]) if last else tensor


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, shape: ConvShape) -> Tensor:
    return convolve(x, weight, bias, stride=shape.stride, padding=shape.padding)


def _relative(low: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(low.float() - exact) / torch.linalg.vector_norm(exact))


def shapes_of_run(
    vae: nn.Module, critic: nn.Module | None, *, geometry: Geometry, clips: Sequence[int], parts: int
) -> dict[str, frozenset[ConvShape]]:
    """Shapes of every convolution of a step, by name with `vae.` or `critic.` in front. Computes nothing.

    clips: sizes b 3 t h w of a batch. parts: pieces that it goes through the autoencoder in.
    """
    b, c, t, h, w = clips
    last = torch.channels_last_3d
    part = torch.empty(math.ceil(b / parts), c, geometry.padded_frames(t), h, w, device="meta")
    noise = torch.empty(len(part), *geometry.latent_shape(t, h, w), device="meta")
    shapes, (recon, _) = shapes_of(vae, part.contiguous(memory_format=last), noise)
    found = {f"vae.{name}": each for name, each in shapes.items()}
    if critic is not None:
        recon = crop_frames(recon, t)
        layouts = torch.empty((b, *recon.shape[1:]), device="meta"), torch.empty(clips, device="meta")
        looks = [
            shapes_of(critic, each)[0] for each in (layouts[0], layouts[1].contiguous(memory_format=last))
        ]
        found |= {f"critic.{name}": looks[0][name] | looks[1][name] for name in looks[0]}
    return found


def shapes_of(network: nn.Module, *inputs: Tensor) -> tuple[dict[str, frozenset[ConvShape]], Any]:
    """Shapes of every convolution of a network in one forward pass on the meta device, and its output.

    The network itself is not touched. A convolution that the pass doesn't reach has none. Any: what the
    network returns.
    """
    own = dict(network.named_parameters()) | dict(network.named_buffers())
    stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in own.items()}
    with torch.no_grad(), _Recorder() as recorder:
        output = torch.func.functional_call(network, stand_ins, inputs)
    weights = {name: stand_ins[f"{name}.weight"] for name in convolutions(network)}
    return {name: frozenset(recorder.seen.get(_storage(w), ())) for name, w in weights.items()}, output


def _storage(tensor: Tensor) -> int:
    """Tells tensors apart where there is no memory to have an address; a view is the same."""
    return tensor.untyped_storage()._cdata


class _Recorder(TorchDispatchMode):
    """Notes the convolutions that run, whoever calls them, by the storage of their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, set[ConvShape]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # Any: as torch passes them
        if func is torch.ops.aten.convolution.default:
            x, weight, bias, stride, padding = args[:5]
            shape = ConvShape(
                x=tuple(x.shape),
                weight=tuple(weight.shape),
                stride=tuple(stride),
                padding=tuple(padding),
                bias=bias is not None,
                x_last=x.is_contiguous(memory_format=LAYOUTS[x.ndim]),
                weight_last=weight.is_contiguous(memory_format=LAYOUTS[weight.ndim]),
            )
            self.seen.setdefault(_storage(weight), set()).add(shape)
        return func(*args, **(kwargs or {}))


def _read(cache: Path) -> tuple[dict[str, dict[str, float | None]], str]:
    """Errors by machine and shape, and what was wrong with the file."""
    try:
        found = json.loads(cache.read_text())
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError) as error:
        return {}, f"{cache} can't be read ({error}); its shapes are tried again"
    if isinstance(found, dict) and all(_holds_errors(each) for each in found.values()):
        return found, ""
    return {}, f"{cache} does not hold what was written there; its shapes are tried again"


def _holds_errors(found: object) -> bool:
    if not isinstance(found, dict):
        return False
    return all(value is None or isinstance(value, float | int) for value in found.values())


def _write(cache: Path, content: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    try:
        write_whole(cache, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        return [f"{cache} can't be written ({error}); the shapes will be tried again at the next start"]
    return []
