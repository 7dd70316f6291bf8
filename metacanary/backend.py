"""XLA's flags: deterministic operations, so many threads, no more GPU memory than is needed.

To be called before JAX computes anything, since XLA reads its flags when it is first used:

    from metacanary import backend
    backend.configure()
"""

from __future__ import annotations

import os


def configure(*, threads: int | None = None) -> None:
    """Set the flags that exact replays need, and how many threads XLA may use on a CPU.

    On a GPU, `--xla_gpu_deterministic_ops=true` replaces operations whose result depends on the order in which the
    hardware works (scatters, matrix products, convolutions) by deterministic ones, which may be slower. Without it a
    replayed state may differ from the first one, which `metagradient.replay` refuses. Which kernels XLA picks by timing
    them may differ between processes, and with them the last bits of a resumed run; XLA's persisted autotuning
    (`--xla_gpu_per_fusion_autotune_cache_dir`) keeps the choice. A CPU needs nothing: there XLA is deterministic for a
    given number of threads.

    Args:
      threads: of XLA on a CPU, whatever the machine has; None leaves it alone.

    Guarantees:
      What the user has set wins: flags in XLA_FLAGS, which come last, and XLA_PYTHON_CLIENT_PREALLOCATE.

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
