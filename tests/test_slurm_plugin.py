"""What is mended of Snakemake's SLURM plugin."""

import subprocess
import sys
from pathlib import Path

import snakemake_executor_plugin_slurm as plugin

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "workflow" / "scripts"))

import _slurm_plugin


def test_last_answer_holds_while_there_is_none():
    answers = iter([None, 300, None, None, 60, None])
    answer = _slurm_plugin.remembering(lambda: next(answers))
    assert [answer() for _ in range(6)] == [None, 300, 300, 300, 60, 60]


def test_plugin_asks_through_what_is_mended(monkeypatch):
    """So that a new version of the plugin that asks otherwise is noticed."""
    asked = []
    monkeypatch.setattr(plugin, "get_min_job_age", lambda: asked.append(None) or 300)
    _slurm_plugin.mend()
    _slurm_plugin.mend()  # a workflow may be parsed twice
    assert plugin.Executor.check_active_jobs.__globals__["get_min_job_age"]() == 300
    assert len(asked) == 1
    assert "get_min_job_age" in plugin.Executor.check_active_jobs.__code__.co_names


def test_plugin_that_is_not_loaded_is_left_alone():
    code = "import sys, _slurm_plugin; _slurm_plugin.mend(); assert _slurm_plugin.PLUGIN not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(_slurm_plugin.__file__).parent, check=True)
