"""XLA's settings: deterministic operations, so many threads, no more GPU memory than is needed, a cache of its code.

To be called before JAX computes anything, since XLA reads its flags when it is first used:

    from metacanary import backend
    backend.configure()
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

MIN_COMPILE_SECONDS = 0.1
"""What is compiled faster is not kept."""


def configure(*, threads: int | None = None, compiled: Path | None = None) -> None:
    """Set the flags that exact replays need, and how many threads XLA may use on a CPU.

    On a GPU, `--xla_gpu_deterministic_ops=true` replaces operations whose result depends on the order in which the
    hardware works (scatters, matrix products, convolutions) by deterministic ones, which may be slower. Without it a
    replayed state may differ from the first one, which `metagradient.replay` refuses. Which kernels XLA picks by timing
    them may differ between processes, and with them the last bits of a resumed run; XLA's persisted autotuning
    (`--xla_gpu_per_fusion_autotune_cache_dir`) keeps the choice. A CPU needs nothing: there XLA is deterministic for a
    given number of threads.

    Args:
      threads: of XLA on a CPU, whatever the machine has; None leaves it alone.
      compiled: folder in which jobs share what XLA compiled, and on a GPU which kernels it picked; None shares nothing.
        Machines with other CPUs use another folder in it: code for one may not run on the next.

    Guarantees:
      What the user has set wins: flags in XLA_FLAGS, which come last, XLA_PYTHON_CLIENT_PREALLOCATE,
      JAX_COMPILATION_CACHE_DIR and JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS.

    References:
      openxla.org/xla/determinism.
    """
    flags = ["--xla_gpu_deterministic_ops=true"]
    if threads == 1:
        flags.append("--xla_cpu_multi_thread_eigen=false")
    os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")]).strip()
    if threads is not None:
        os.environ["NPROC"] = str(threads)  # the size of XLA's thread pool
    # Jobs that run side by side share a GPU; by default each would take three quarters of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if compiled is not None:
        _share_compiled(compiled.absolute() / cpu_digest())


def _share_compiled(folder: Path) -> None:
    """Tell JAX where to keep what it compiled, whether it has been imported, and has read its environment, or not."""
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": MIN_COMPILE_SECONDS,
    }
    for name, value in options.items():
        if name.upper() not in os.environ:
            os.environ[name.upper()] = str(value)
            if "jax" in sys.modules:
                sys.modules["jax"].config.update(name, value)


def cpu_digest() -> str:
    """Digests what this machine's CPU is and can do."""
    path = Path("/proc/cpuinfo")
    names = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU part")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = sorted({line for line in lines if line.partition(":")[0].strip() in names})
    return hashlib.sha256("\n".join([platform.machine(), *found]).encode()).hexdigest()[:16]
