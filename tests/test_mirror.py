"""tests/ mirrors the package: every module has a test module under its own path, or a reason why not."""

import ast
import re
from pathlib import Path

import diffussm_cli

ROOT, TESTS = Path(diffussm_cli.__file__).parent, Path(__file__).parent
# Where a module without a test module of its own is tested, or why it is not.
TESTED_ELSEWHERE = {
    "__init__.py": "holds the version, which tests/test_docs.py compares",
    "__main__.py": "tests/test_survival.py starts it",
    "commands/__init__.py": "is empty",
    "commands/encode.py": "tests/test_encode.py",
    "commands/eval.py": "tests/test_eval.py",
    "commands/profile.py": "tests/test_profile.py",
    "commands/sample.py": "tests/test_cli.py",
    "data/__init__.py": "is empty",
    "data/latents/__init__.py": "names what others hold",
    "data/latents/encoding.py": "tests/data/test_latents.py and tests/test_encode.py",
    "data/latents/reading.py": "tests/data/test_latents.py",
    "data/latents/repair.py": "tests/data/test_latents.py",
    "diffusion/__init__.py": "is empty",
    "evaluation/__init__.py": "names what others hold",
    "machine/__init__.py": "is empty",
    "model/__init__.py": "chooses between two networks: tests/profiling/test_flops.py builds every preset",
    "model/backbone.py": "does nothing without blocks: tests/model/test_diffussm.py and tests/model/test_dit.py",
    "model/mixers/__init__.py": "tests/model/test_mixers.py",
    "model/s4d/__init__.py": "names what others hold",
    "model/s4d/convolution.py": "tests/model/test_s4d.py",
    "model/s4d/kernel.py": "tests/model/test_s4d.py",
    "model/s4d/layer.py": "tests/model/test_s4d.py",
    "profiling/__init__.py": "names what others hold",
    "runs/__init__.py": "names what others hold",
    "sampling/__init__.py": "names what others hold",
    "sampling/precision.py": "tests/sampling/test_generate.py: by the images, which it must not change",
    "sampling/session.py": "tests/test_cli.py, and as a library tests/test_examples.py",
    "training/__init__.py": "names what others hold",
}


def own_test(module: Path) -> Path:
    return TESTS / module.parent / f"test_{module.name}"


def test_every_module_has_a_test_module_or_a_reason():
    modules = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    assert {m.as_posix() for m in modules if not own_test(m).is_file()} == set(TESTED_ELSEWHERE)


def test_every_test_module_that_is_named_is_there():
    named = {name for where in TESTED_ELSEWHERE.values() for name in re.findall(r"tests/[\w/]+\.py", where)}
    assert len(named) > 8
    assert [name for name in sorted(named) if not (TESTS.parent / name).is_file()] == []


def test_a_module_that_is_tested_nowhere_only_imports():
    for module, where in TESTED_ELSEWHERE.items():
        if "tests/" not in where:
            tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
            assert {type(node) for node in tree.body} <= {ast.Expr, ast.ImportFrom, ast.Assign}, module
