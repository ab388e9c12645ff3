"""What the machine tells, against what the system says of it."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from causalvae.errors import ConfigError
from causalvae.machine import (
    ASSUME_BF16,
    BF16_FLAGS,
    Machine,
    available_bytes,
    capability,
    environment,
    free_disk_bytes,
    free_memory_bytes,
    home,
    pick_device,
    torch_facts,
)


def test_a_look_at_the_machine_agrees_with_the_system_and_needs_no_torch() -> None:
    machine = Machine.look()
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert machine.memory_bytes is not None
    assert machine.memory_bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.cpu
    code = (
        "import sys; from causalvae.machine import Machine; Machine.look(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_affinity_mask_counts() -> None:
    code = (
        "import os; from causalvae.machine import Machine; "
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); print(Machine.look().cores)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"1\n"


def test_devices_are_what_torch_sees() -> None:
    facts = torch_facts()
    assert facts.threads >= 1
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") == ("cuda" if facts.gpus else "cpu") or pick_device("auto") == "mps"
    for name, words in {
        "cuda:99": "not on this machine",
        "gpu": "must be auto",
        "cuda:x": "must be auto",
    }.items():
        with pytest.raises(ConfigError, match=words):
            pick_device(name)


def test_only_listed_variables_of_the_environment_are_written_down() -> None:
    assert environment({"OMP_NUM_THREADS": "2", "HF_TOKEN": "s3cret"}) == {"OMP_NUM_THREADS": "2"}


def test_free_space_is_told_for_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert free_disk_bytes(tmp_path / "a" / "b") > 0


def test_bf16_on_a_cpu_takes_the_flags_of_the_cpu_or_the_word_of_an_expert() -> None:
    found = capability("cpu", {})
    flags = set(Machine.look().cpu_flags) & set(BF16_FLAGS)
    if not flags:
        assert "has no bf16" in found.missing["bf16"]
    assumed = capability("cpu", {ASSUME_BF16: "1"}, names=("bf16",))
    assert "fp16" not in assumed.remarks
    assert "bf16" not in assumed.missing
    if "bf16" in found.missing:
        assert ASSUME_BF16 in assumed.remarks["bf16"]
    assert environment({ASSUME_BF16: "1"}) == {ASSUME_BF16: "1"}


def test_things_are_kept_where_the_environment_says(tmp_path: Path) -> None:
    assert home({"CAUSALVAE_HOME": str(tmp_path)}) == tmp_path
    assert home({"CAUSALVAE_HOME": ""}) == Path.home() / ".cache" / "causalvae"


def test_free_memory_is_part_of_what_the_machine_has() -> None:
    free, whole = free_memory_bytes(), Machine.look().memory_bytes
    assert free is not None
    assert whole is not None
    assert 0 < free < whole
    share = available_bytes("cpu")
    assert share is not None
    assert 0 < share < whole


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_that_is_freed_can_be_handed_back_at_once() -> None:
    code = """
import sys, torch
from pathlib import Path
from causalvae.machine import hand_back_memory
if sys.argv[1] == "hand back":
    assert hand_back_memory()
for mib in (30, 4):
    held = [torch.ones(mib * 2**18) for _ in range(100 // mib)]
    del held[:-1]
print(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
"""
    sizes = [
        int(subprocess.run([sys.executable, "-c", code, how], check=True, capture_output=True).stdout)
        for how in ("hand back", "keep")
    ]
    assert sizes[0] < sizes[1] - 50 * 2**20
