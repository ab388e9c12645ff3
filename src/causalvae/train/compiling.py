"""jit_level: the blocks of an autoencoder compiled one by one, in place, so that weights keep their names.

Blocks of one shape share their compiled code. Only residual blocks are compiled: they are nearly all of the
time of a step. Critics are not: their gradient is wanted at the reconstruction alone, and compiled code would
compute that of their weights as well. Where compilation fails, everything goes on eager.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from causalvae.models.layers import ResnetBlock

JitLevel = Literal["O0", "O1", "O2"]

MODES: dict[JitLevel, str] = {"O1": "default", "O2": "max-autotune-no-cudagraphs"}
MAX_SHAPES = 256  # of blocks and clips; past torch's own limit of 8 the rest would run eager in silence
REASON_LENGTH = 200  # characters of a compiler's message that a person is shown


def compile_blocks(vae: nn.Module, level: JitLevel, *, backend: str = "inductor") -> list[str]:
    """Have the blocks of a model compiled when they are first called. Returns warnings for the person.

    level: O0 changes nothing. backend: of torch.compile; "eager" only traces. If this machine has no
    compiler for the device of the weights, one warning, and nothing is changed.
    """
    if level == "O0":
        return []
    if backend == "inductor":
        problem = compiler_problem(next(vae.parameters()).device)
        if problem is not None:
            return [f"--jit_level {level}: this machine can't compile, so training runs eager: {problem}"]
    import torch._dynamo.config as dynamo_config  # late: not needed without compilation

    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, MAX_SHAPES)
    mode = MODES[level] if backend == "inductor" else None
    for block in _blocks(vae):
        block.compile(dynamic=False, mode=mode, backend=backend)
    return []


def compiler_problem(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device, in one line; None if a small function could."""
    x = torch.ones(8, device=device, requires_grad=True)
    compiled = torch.compile(_probe, dynamic=False)
    try:
        compiled(x).sum().backward()
    except compile_errors() as error:
        return reason_of(error)
    return None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) * x


def compile_errors() -> tuple[type[Exception], ...]:
    """What a step raises if a block can't be compiled, forward or backward: for an `except` clause."""
    from torch._dynamo.exc import TorchDynamoException  # late: as above
    from torch._inductor.exc import CppCompileError

    return TorchDynamoException, CppCompileError


def reason_of(error: Exception) -> str:
    """The first line of an error that says something, short enough for a warning."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:REASON_LENGTH] if lines else type(error).__name__


def back_to_eager(vae: nn.Module, error: Exception, *, level: JitLevel) -> str:
    """Undo compile_blocks after an error of compile_errors(); returns the warning for the person."""
    for block in _blocks(vae):
        block._compiled_call_impl = None  # what Module.compile sets; torch has no call that undoes it
    return (
        f"--jit_level {level}: a block could not be compiled, so training goes on eager: {reason_of(error)}"
    )


@contextmanager
def uncompiled(vae: nn.Module) -> Iterator[None]:
    """Compiled blocks run eager inside: for evaluation and streams, whose clips have other shapes."""
    if all(block._compiled_call_impl is None for block in _blocks(vae)):
        yield
        return
    with torch.compiler.set_stance("force_eager"):  # imports the compiler
        yield


def _blocks(vae: nn.Module) -> list[ResnetBlock]:
    return [module for module in vae.modules() if isinstance(module, ResnetBlock)]
