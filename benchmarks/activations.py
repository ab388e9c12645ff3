"""Activations kept for backward and the time of it, against the plain order of work. Prints Markdown tables.

    python benchmarks/activations.py [--hidden 64] [--frames 5] [--size 48] [--repeats 5] [--threads 2]

Kept: exact bytes of the storages that autograd saves, counted once, weights left out, for the published
layout at its full size on the meta device, per value of the input. Time: processor time of forward and
backward of the autoencoder, each order of work in turn within one process. The plain order is that of torch:
every layer a call of its own.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causalvae import rng
from causalvae.models.base import Posterior
from causalvae.models.build import build
from causalvae.models.causalvae import CausalVAE, Level, Middle
from causalvae.models.layers import (
    FrameDownsample,
    ResnetBlock,
    SpatialUpsample,
    TimeDownsample,
    TimeUpsample,
)
from causalvae.models.presets import PRESETS, CausalVAEConfig
from causalvae.train.networks import lay_out

PUBLISHED = 15_100  # bytes per input value that the published code keeps, fp32
KINDS = ("plain", "fused", "fused, recomputing")
CLIP = (1, 3, 17, 256, 256)


def before(x: Tensor, frames: int) -> Tensor:
    """x with its first frame repeated in front: b c t h w -> b c (frames + t) h w."""
    return torch.cat([x[:, :, :1].expand(-1, -1, frames, -1, -1), x], dim=2)


def plain_layer(module: nn.Module, x: Tensor) -> Tensor:
    """One layer, its parts called one after the other."""
    if isinstance(module, ResnetBlock):
        h = module.conv1(F.silu(module.norm1(x)))
        h = module.conv2(F.silu(module.norm2(h)))
        return (x if module.nin_shortcut is None else module.nin_shortcut(x)) + h
    if isinstance(module, FrameDownsample):
        return module.conv(F.pad(x, (0, 1, 0, 1)))
    if isinstance(module, SpatialUpsample):
        return module.conv(x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4))
    if isinstance(module, TimeDownsample):
        window, alpha = before(x, 2), torch.sigmoid(module.mix_factor)
        mean = (window[:, :, 0:-2:2] + window[:, :, 1:-1:2] + window[:, :, 2::2]) / 3
        return alpha * mean + (1 - alpha) * module.conv(window)
    if isinstance(module, TimeUpsample):
        u, v, alpha = x[:, :, 1:-1], x[:, :, 2:], torch.sigmoid(module.mix_factor)
        between = torch.stack([0.75 * u + 0.25 * v, 0.25 * u + 0.75 * v], dim=3).flatten(2, 3)
        y = torch.cat([x[:, :, :2], between, x[:, :, -1:]], dim=2) if x.shape[2] > 1 else x
        return alpha * y + (1 - alpha) * module.conv(y)
    return module(x)


def plain_part(part: nn.Module, x: Tensor) -> Tensor:
    """A level, or the middle, layer by layer."""
    if isinstance(part, Middle):
        inner = [part.block_1, *([] if part.attn_1 is None else [part.attn_1]), part.block_2]
    else:
        assert isinstance(part, Level)
        inner = [*part.block, *(part.get_submodule(name) for name in part.order)]
    for module in inner:
        x = plain_layer(module, x)
    return x


def plain(vae: CausalVAE, x: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
    """Reconstruction and posterior of x by the plain order of work, `conv` layout."""
    encoder, decoder = vae.encoder, vae.decoder
    assert encoder.norm_out is not None
    assert decoder.norm_out is not None
    assert vae.quant_conv is not None
    assert vae.post_quant_conv is not None
    h = encoder.conv_in(x)
    for part in (*encoder.down, encoder.mid):
        h = plain_part(part, h)
    posterior = Posterior.of_moments(vae.quant_conv(encoder.conv_out(F.silu(encoder.norm_out(h)))))
    h = decoder.conv_in(vae.post_quant_conv(posterior.sample(noise)))
    for part in (decoder.mid, *reversed(decoder.up)):
        h = plain_part(part, h)
    return decoder.conv_out(F.silu(decoder.norm_out(h))), posterior


def forward(kind: str, vae: CausalVAE, x: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
    """Reconstruction and posterior in one order of work."""
    vae.set_recompute(on=kind == "fused, recomputing")
    return plain(vae, x, noise) if kind == "plain" else vae(x, noise)


def kept_bytes(config: CausalVAEConfig, kind: str) -> float:
    """What autograd saves of activations, per value of a clip of 1 3 17 256 256."""
    with torch.device("meta"):
        vae = CausalVAE(config)
        x = torch.empty(CLIP).contiguous(memory_format=torch.channels_last_3d)
        noise = torch.empty(1, *vae.geometry.latent_shape(*CLIP[2:]))
    weights = {p.untyped_storage()._cdata for p in vae.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = forward(kind, vae, x, noise)
    total = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)
    del held
    return total / x.numel()


def seconds(run: Callable[[], tuple[Tensor, Posterior]], vae: CausalVAE) -> float:
    """Processor time of one forward and backward, over all threads: other programs disturb it less."""
    started = time.process_time()
    recon, posterior = run()
    (recon.square().mean() + posterior.kl().mean()).backward()
    vae.zero_grad(set_to_none=True)
    return time.process_time() - started


def print_times(config: CausalVAEConfig, args: argparse.Namespace) -> None:
    """Milliseconds of each order of work and the median ratio to the plain one."""
    vae = build(config)
    lay_out(vae)
    x = rng.normal((1, 3, args.frames, args.size, args.size), 1)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    noise = rng.normal((1, *vae.geometry.latent_shape(args.frames, args.size, args.size)), 2)
    runs = {kind: partial(forward, kind, vae, x, noise) for kind in KINDS}
    for run in runs.values():
        seconds(run, vae)
    times = {kind: [] for kind in KINDS}
    for _ in range(args.repeats):
        for kind, run in runs.items():
            times[kind].append(seconds(run, vae))
    for kind in KINDS:
        ratio = statistics.median(b / a for a, b in zip(times["plain"], times[kind], strict=True))
        middle = statistics.median(times[kind]) * 1e3
        print(f"| {config.norm} | {kind} | {middle:.0f} | {ratio:.2f} |", flush=True)


def main() -> None:
    """Both tables, for the three kinds of norm."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("hidden", 64), ("frames", 5), ("size", 48), ("repeats", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    configs = [
        dataclasses.replace(PRESETS["causalvae-488"], norm=norm) for norm in ("clip", "frame", "channel")
    ]
    print("| norm | order of work | kept, kB per input value | of the published code |\n|---|---|---|---|")
    for config in configs:
        for kind in KINDS:
            kept = kept_bytes(config, kind)
            print(f"| {config.norm} | {kind} | {kept / 1e3:.2f} | {kept / PUBLISHED:.3f} |")
    print("\n| norm | order of work | forward and backward, processor ms | ratio |\n|---|---|---|---|")
    for config in configs:
        print_times(dataclasses.replace(config, hidden_size=args.hidden), args)


if __name__ == "__main__":
    main()
