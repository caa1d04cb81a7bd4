"""What a result depends on beside the code's arguments: the commit, the machine, the versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "triton",
    "fused-losses",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "trl",
    "flash-attn",
    "flash-linear-attention",
)


def environment(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        **commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "cuda": torch.version.cuda or torch.version.hip,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "clocks": clocks(),
        }
    else:
        found["threads"] = torch.get_num_threads()
    return found


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    for line in _output("lscpu").splitlines():
        if line.startswith("Model name:"):
            return line.partition(":")[2].strip()
    return platform.processor() or "cpu"


def folder_name(device: str) -> str:
    """Where results of this machine go under ``bench/results``."""
    return "cpu" if device == "cpu" else slug(device_name(device))


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def made_on(device: str, *packages: str) -> str:
    """Device, versions and commit: the line above a table."""
    where = environment(device)
    versions = [f"{name} {version}" for name in packages if (version := installed(name))]
    changed = " and changes to it" if where["modified"] else ""
    return f"{where['device']}; {', '.join(versions)}; commit {str(where['commit'])[:12]}{changed}"


def clocks() -> str | None:
    """Clocks, power and temperature as the driver reports them now; None where it does not."""
    fields = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
    return _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0").strip() or None


def commit() -> dict[str, Any]:
    """The commit, and whether tracked files differ from it. FUSED_LOSSES_COMMIT names it for a copy without its history."""
    if "FUSED_LOSSES_COMMIT" in os.environ:
        return {"commit": os.environ["FUSED_LOSSES_COMMIT"], "modified": None}
    root = str(Path(__file__).resolve().parent.parent)
    revision = _output("git", "-C", root, "rev-parse", "HEAD").strip()
    if not revision:
        return {"commit": None, "modified": None}
    # New results do not count as changes.
    changed = _output("git", "-C", root, "status", "--porcelain", "-uno", "--", ".", ":!bench/results")
    return {"commit": revision, "modified": bool(changed.strip())}


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
