"""What may stand in a torch pickle beside weights: types of data, read as stand-ins that do nothing.

Trainers save their settings with the weights, as objects of many classes. None of those classes is imported,
made or called: each is replaced by one of three stand-ins. A type that is on no list here is refused by name.
"""

from collections import OrderedDict
from typing import Any

WEIGHTS = frozenset(
    {
        "collections.OrderedDict", "collections.Counter", "torch.Size", "torch.device", "_codecs.encode",
        "builtins.set", "builtins.complex", "torch.serialization._get_layout",
        "torch.nn.parameter.Parameter", "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state",
        "torch._tensor._rebuild_from_type_v2", "torch.storage.UntypedStorage", "torch.storage.TypedStorage",
    }
)  # fmt: skip  # what torch itself allows and weights need
STORAGES = (
    "FloatStorage", "DoubleStorage", "HalfStorage", "BFloat16Storage", "LongStorage", "IntStorage",
    "ShortStorage", "CharStorage", "ByteStorage", "BoolStorage", "UntypedStorage", "TypedStorage",
    "ComplexFloatStorage", "ComplexDoubleStorage",
)  # fmt: skip
DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16",
    "uint32", "uint64", "bool", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip


class Inert:
    """Stands for an object: takes whatever it is made of and keeps none of it."""

    def __new__(cls, *parts: Any) -> "Inert":  # noqa: ARG004  # Any: whatever a file holds
        """Made of anything."""
        return super().__new__(cls)

    def __init__(self, *parts: Any) -> None:  # Any: whatever a file holds
        pass

    def __setstate__(self, state: object) -> None:
        """Filled with nothing."""


class Table:
    """Stands for a kind of dict: what is made is an empty one, which the file may fill."""

    def __new__(cls, *parts: Any) -> OrderedDict[Any, Any]:  # noqa: ARG004  # Any: whatever a file holds
        """Made of anything."""
        return OrderedDict()


class Row:
    """Stands for a kind of list: what is made is an empty one, which the file may fill."""

    def __new__(cls, *parts: Any) -> list[Any]:  # noqa: ARG004  # Any: whatever a file holds
        """Made of anything."""
        return []


OBJECTS = (
    "argparse.Namespace", "types.SimpleNamespace",
    *(f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in (
        "Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")),
    *(f"builtins.{kind}" for kind in (
        "int", "float", "str", "bool", "bytes", "tuple", "object", "frozenset", "slice", "range")),
    "copyreg._reconstructor", "typing.Any", "datetime.datetime", "datetime.date", "datetime.timedelta",
    "datetime.timezone", "decimal.Decimal", "fractions.Fraction", "uuid.UUID",
    "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    *(f"numpy.{kind}" for kind in (
        "bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16",
        "float32", "float64")),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float16", "Float32", "Float64", "Int32", "Int64", "Bool")),
    "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata", "omegaconf.base.SCMode",
    *(f"omegaconf.nodes.{kind}Node" for kind in (
        "Any", "String", "Integer", "Float", "Boolean", "Path", "Bytes", "Enum")),
    "torch.torch_version.TorchVersion",
    *(f"{package}.callbacks.{place}" for package in ("pytorch_lightning", "lightning.pytorch") for place in (
        "model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping", "lr_monitor.LearningRateMonitor",
        "progress.tqdm_progress.TQDMProgressBar")),
)  # fmt: skip
TABLES = (
    "builtins.dict", "collections.defaultdict", "easydict.EasyDict", "addict.addict.Dict",
    "yacs.config.CfgNode", "munch.Munch", "diffusers.configuration_utils.FrozenDict",
    *(f"{package}.AttributeDict" for package in (
        "pytorch_lightning.utilities.parsing", "lightning.pytorch.utilities.parsing",
        "lightning_fabric.utilities.data", "lightning.fabric.utilities.data")),
)  # fmt: skip
ROWS = ("builtins.list", "collections.deque")


def stand_ins() -> dict[str, type]:
    """Stand-in of each type of data, by the name that pickles use for it."""
    return dict.fromkeys(OBJECTS, Inert) | dict.fromkeys(TABLES, Table) | dict.fromkeys(ROWS, Row)


def allowed() -> frozenset[str]:
    """Every name that a pickle of weights may use."""
    storages = {f"{place}.{kind}" for place in ("torch", "torch.storage") for kind in STORAGES}
    return WEIGHTS | storages | {f"torch.{kind}" for kind in DTYPES} | stand_ins().keys()
