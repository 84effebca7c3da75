"""What the Tab key offers, asked as a shell asks."""

import os
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from diffussm_cli.cli import app

# What is typed, and what is offered for its last word.
OFFERED = {
    "commands": ("tr", "train"),
    "options": ("sample --guidance-", "--guidance-channels --guidance-interval"),
    "presets": ("train --preset emoji-", "emoji-axial emoji-quick"),
    "presets of profile": ("profile --preset xl-2", "xl-256"),
    "models": ("sample ", "emoji mnist mnist-one-step runs/a runs/b"),
    "runs to sample": ("sample runs/", "runs/a runs/b"),
    "runs to evaluate": ("eval runs/b", "runs/b"),
    "runs to begin from": ("train --init m", "mnist mnist-one-step"),
    "runs to guide with": ("sample mnist --guide-with runs/a", "runs/a"),
    "runs to continue": ("train --resume --out r", "runs/a runs/b"),
    "samplers": ("sample --sampler d", "ddpm ddim dpmpp"),
    "fields": ("train --set eval.im", "eval.images="),
    "fields with one beginning": ("train --set train.keep", "train.keep_checkpoints="),
    "choices of a field": ("train --set model.kernel=", "model.kernel= model.kernel=3"),
    "beginning of a choice": ("train --set sample.sampler=u", "sample.sampler=unipc"),
    "truth": ("train --set train.compile=t", "train.compile=true"),
    "no field": ("train --set train.nothing", ""),
    "fields of eval": ("eval --set ", "sample.sampler="),
    "files, by the shell": ("sample --image ", ""),
}


def completed_by_bash(words, between):
    """What the program answers to bash, which puts its words together with `between`."""
    shell = {
        "_DIFFUSSM_COMPLETE": "complete_bash",
        "COMP_WORDS": between.join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    return CliRunner().invoke(app, [], prog_name="diffussm", env=shell)


@pytest.mark.parametrize(("typed", "offered"), OFFERED.values(), ids=OFFERED)
def test_tab_offers_what_fits(typed, offered, tmp_path, monkeypatch):
    for name in ("runs/a", "runs/b", "runs/no-run"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("runs/a", "runs/b"):
        (tmp_path / name / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    words = ["diffussm", *typed.split(" ")]
    result = completed_by_bash(words, " ")
    assert result.exit_code == 0, result.output
    answer = result.stdout.split()
    assert answer[: len(offered.split())] == offered.split()
    assert all(word.startswith(words[-1]) for word in answer)
    assert bool(answer) == bool(offered)


def test_only_field_that_fits_is_offered_with_its_default():
    """Two offers, as after a single one the shell would set a space."""
    typed = {"_DIFFUSSM_COMPLETE": "complete_bash", "COMP_CWORD": "3"}
    typed["COMP_WORDS"] = "diffussm train --set eval.im"
    result = CliRunner().invoke(app, [], prog_name="diffussm", env=typed)
    assert result.stdout.split() == ["eval.images=", "eval.images=5000"]


BROKEN = {  # words as bash breaks them, and what is offered for the last one
    "after the sign": ("train --set train.compile =", "false true"),
    "an empty word after it": ("train --set train.compile = ", "false true"),
    "a value": ("train --set train.compile = t", "true"),
    "an option with its value": ("train --preset = emoji-q", "emoji-quick"),
    "earlier words": (
        "train --data builtin : mnist --set model.depth = 4 --preset emoji-q",
        "emoji-quick",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bash_gets_values_behind_an_equals_sign_at_which_it_breaks_words(case):
    typed, offered = BROKEN[case]
    result = completed_by_bash(["diffussm", *typed.split(" ")], "\n")
    assert result.stdout.split() == offered.split(), result.output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_for_shell_is_shown(shell):
    typed = {"_DIFFUSSM_COMPLETE": f"source_{shell}"}
    result = CliRunner().invoke(app, [], prog_name="diffussm", env=typed)
    assert "_DIFFUSSM_COMPLETE=complete_" in result.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_preset_without_torch(tmp_path):
    """The script in a real shell, and the program in a process of its own that must not import
    torch.
    """
    program = tmp_path / "diffussm"
    program.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        "sys.modules['torch'] = None  # an import of it is an error\n"
        "from diffussm_cli.cli import app\n"
        "app(prog_name='diffussm')\n"
    )
    program.chmod(0o755)
    script = (
        'eval "$(_DIFFUSSM_COMPLETE=source_bash diffussm)"\n'
        "complete -p diffussm\n"
        "COMP_WORDS=(diffussm train --preset emoji-q); COMP_CWORD=3\n"
        '_diffussm_completion diffussm; echo "${COMPREPLY[@]}"\n'
        "COMP_WORDS=(diffussm sample mn); COMP_CWORD=2\n"
        '_diffussm_completion diffussm; echo "${COMPREPLY[@]}"\n'
        "COMP_WORDS=(diffussm eval mnist --set sample.sampler = u); COMP_CWORD=6\n"
        '_diffussm_completion diffussm; echo "${COMPREPLY[@]}"\n'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[1:] == ["emoji-quick", "mnist mnist-one-step", "unipc"], (
        done.stderr
    )
