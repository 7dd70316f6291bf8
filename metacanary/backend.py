"""XLA's settings: deterministic operations, so many threads, no more GPU memory than is needed, a cache of its code.

To be called before JAX computes anything, since XLA reads its flags when it is first used, and never again:

    from metacanary import backend
    backend.configure()
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import warnings
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

    Warns:
      RuntimeWarning: JAX has begun to compute, so that what is not set yet would have no effect; it stays unset. The
        folder of `compiled` is taken all the same.

    Guarantees:
      What the user has set wins: each flag in XLA_FLAGS, XLA_PYTHON_CLIENT_PREALLOCATE, JAX_COMPILATION_CACHE_DIR and
      JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS.
      The environment says what XLA computes with. A second call with the same arguments changes nothing.

    References:
      openxla.org/xla/determinism.
    """
    missing = _missing(threads)
    if not _has_begun():
        os.environ.update(missing)
    elif missing:
        # And stays so: a checkpoint of a replay takes the environment for what XLA computed with.
        settings = " ".join(f"{name}={value!r}" for name, value in missing.items())
        expected = "expected backend.configure() to be called before, or these to be set in the environment"
        warnings.warn(f"JAX has begun to compute without {settings}: {expected}", RuntimeWarning, stacklevel=2)
    if compiled is not None:
        _share_compiled(compiled.absolute() / cpu_digest())


def _missing(threads: int | None) -> dict[str, str]:
    """What the environment lacks of what XLA reads in it when it is first used."""
    flags = ["--xla_gpu_deterministic_ops=true"]
    if threads == 1:
        flags.append("--xla_cpu_multi_thread_eigen=false")
    given = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.partition("=")[0] for flag in given}
    added = [flag for flag in flags if flag.partition("=")[0] not in names]
    missing = {"XLA_FLAGS": " ".join([*added, *given])} if added else {}
    if threads is not None and os.environ.get("NPROC") != str(threads):
        missing["NPROC"] = str(threads)  # the size of XLA's thread pool
    if "XLA_PYTHON_CLIENT_PREALLOCATE" not in os.environ:
        # Jobs that run side by side share a GPU; by default each would take three quarters of its memory.
        missing["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return missing


def _has_begun() -> bool:
    """Whether XLA has read its flags, which no public function tells."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()


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
