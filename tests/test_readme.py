"""The README: its commands parse and plan, its Python runs, its links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest


def blocks(root, language):
    return re.findall(rf"```{language}\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def commands(root):
    lines = "\n".join(blocks(root, "sh")).splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("snakemake --cores")]


def test_readme_commands_plan(root, tmp_path):
    """Each Snakemake command of the README finds its config and targets, dry, in an empty folder."""
    found = commands(root)
    assert len(found) >= 3
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for command in found:
        options = ["--snakefile", root / "Snakefile", "--directory", tmp_path, "-n", "--quiet"]
        call = [sys.executable, "-m", "snakemake", *options, *command]
        done = subprocess.run(call, cwd=root, env=environment, capture_output=True, text=True, check=False)
        # In an empty folder there is no summary to redraw from; all else can be planned.
        redraw = "--allowed-rules" in command and "MissingInput" in done.stdout + done.stderr
        assert done.returncode == 0 or redraw, done.stdout + done.stderr


def test_readme_python_runs(root):
    rng = np.random.default_rng(0)
    first = rng.random(500) < 0.5
    included = np.stack([first, ~first], axis=1).reshape(-1)
    names = {"scores": rng.normal(size=1000) + included, "included": included, "pair_numbers": np.arange(1000) // 2}
    for block in blocks(root, "python"):
        exec(block, names)
    assert isinstance(names["bounds"], pd.DataFrame)
    last = blocks(root, "python")[-1].strip().splitlines()[-1]
    assert float(eval(last, names)) == pytest.approx(_by_differences(names), rel=1e-2)


def _by_differences(names):
    """d loss / d learning rate of the README's training run, by central differences (float32: about 1%)."""

    def final(rate):
        state = np.zeros(2)
        x, y = np.asarray(names["x"], float), np.asarray(names["y"], float)
        for _ in range(100):
            residual = state[0] * x + state[1] - y
            state = state - rate * np.array([2 * np.mean(residual * x), 2 * np.mean(residual)])
        return np.mean((state[0] * x + state[1] - y) ** 2)

    return (final(0.01 + 1e-5) - final(0.01 - 1e-5)) / 2e-5


def test_dpsgd_guide_example_runs(root, capsys):
    """It runs as it stands, and prints what the guide says it prints."""
    guide = (root / "docs" / "dpsgd.md").read_text(encoding="utf-8")
    exec(compile(re.search(r"```python\n(.*?)```", guide, re.DOTALL)[1], "docs/dpsgd.md", "exec"), {})
    pattern = r"sigma (\d\.\d\d); (\d+)% of the other digits are recognised"
    (sigma, share), (printed, found) = (re.search(pattern, text).groups() for text in (guide, capsys.readouterr().out))
    assert printed == sigma
    assert abs(int(found) - int(share)) <= 3


@pytest.mark.parametrize("folder", [".", "docs", "config"])
def test_links_lead_somewhere(root, folder):
    for path in (root / folder).glob("*.md"):
        for link in re.findall(r"\]\(([^)#:\s]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path.name}: {link}"
    for path in (root / "config").glob("*.yaml"):
        for named in re.findall(r"docs/\w+\.md", path.read_text(encoding="utf-8")):
            assert (root / named).exists(), f"{path.name}: {named}"
