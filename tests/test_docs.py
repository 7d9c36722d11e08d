"""README's commands are run as typed, the long ones with few steps; links in the docs lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from agatool.cli import app
from agatool.config import TextConvention
from agatool.data.prepare import prepare_sample, sample_spec
from agatool.tokenization import load_tokenizer

ROOT = Path(__file__).parent.parent
SHORT = {"train": ["--max-steps", "2", "--batch-size", "8"], "eval": ["--rerank", "4"]}
SERVERS = {"serve"}  # do not end by themselves; tests/test_serve.py runs them


def shown_commands() -> list[list[str]]:
    """Every `aga` line of README's shell blocks, comments cut off."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    lines = [part.strip() for block in blocks for line in block.splitlines() for part in line.split("&&")]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("aga ")]


def test_readme_starts_with_the_two_commands() -> None:
    first = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert first is not None
    lines = [line.partition("#")[0].strip() for line in first[1].splitlines()]
    assert lines == ["pip install -e . && aga train --dataset sample", "pip install -e '.[dev]' && pytest"]


def make_albef(path: Path, entries: int) -> None:
    """A tiny checkpoint in ALBEF's form with a vocabulary of so many entries, from the recorded reference weights."""
    tensors = load_file(ROOT / "tests/golden/data/albef_pretrain_tiny/weights.safetensors")
    for name, tensor in tensors.items():
        if re.search(r"word_embeddings|predictions\.(bias|decoder)", name):
            tensors[name] = tensor[torch.arange(entries) % len(tensor)].clone()
    torch.save({"model": tensors}, path)


def test_readme_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "sample_data", tmp_path / "sample_data")
    shutil.copytree(ROOT / "sample_data", tmp_path / "RSTPReid")  # the sample is in RSTPReid's own layout
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    prepare_sample(Path("data/sample"), sample_spec(24, images=2))
    for words in shown_commands():
        if words[0] in SERVERS:
            continue
        if "ALBEF.pth" in words and not Path("ALBEF.pth").exists():
            make_albef(Path("ALBEF.pth"), load_tokenizer("data/rstpreid/tokenizer.json", TextConvention()).vocab_size)
        command = [str(Path(word).expanduser()) if word.startswith("~") else word for word in words]
        result = CliRunner().invoke(app, [*command, *SHORT.get(words[0], [])])
        assert result.exit_code == 0, f"aga {shlex.join(words)}\n{result.output}"


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_json_block_is_json() -> None:
    for page in ROOT.glob("docs/*.md"):
        for block in re.findall(r"```json\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            json.loads(block)
