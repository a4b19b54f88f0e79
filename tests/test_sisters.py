"""What several scripts need is the same text in each, so that their diff is the difference of their algorithms."""

import ast
from collections import Counter, defaultdict

import pytest
from helpers import SCRIPTS

# What is an algorithm's own although another script has something of that name.
OWN = {
    "ppo_clip": {"update"},
    "ppo_kl": {"update", "Agent.__init__"},
    "trpo": {"update", "Agent.__init__", "Agent.kl", "gaussian_kl", "softmax_kl", "gae", "collect", "train", "check"},
    "reinforce": {"update", "softmax_log_prob", "collect", "train", "check"},
}


def blocks(script) -> dict[str, str]:
    """Every function, class, method, flag and banner of a script, but for what is its own: its text"""
    source, found = script.source, {}

    def add(name: str, node: ast.AST) -> None:
        lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
        decorators = [f"@{ast.unparse(decorator)}" for decorator in getattr(node, "decorator_list", [])]
        found[name] = "\n".join(decorators + lines)

    for node in script.syntax.body:
        if isinstance(node, ast.FunctionDef):
            add(node.name, node)
        elif isinstance(node, ast.ClassDef) and node.name in ("Args", "Agent"):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    add(f"{node.name}.{member.name}", member)
                elif isinstance(member, ast.AnnAssign):
                    add(f"{node.name}.{member.target.id}", member)
        elif isinstance(node, ast.ClassDef):
            add(node.name, node)
    return {name: text for name, text in found.items() if name not in OWN.get(script.name, ())}


def test_shared_blocks_are_the_same_text():
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    for script in SCRIPTS:
        for name, text in blocks(script).items():
            texts[name][script.name] = text
    drifted = []
    for name, of_scripts in texts.items():
        usual, _ = Counter(of_scripts.values()).most_common(1)[0]
        drifted += [f"{script}.py: {name}" for script, text in of_scripts.items() if text != usual]
    assert not drifted


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_what_is_called_its_own_is_there_and_not_a_copy(script):
    for name in OWN.get(script.name, ()):
        assert f"def {name.rpartition('.')[2]}(" in script.source


def test_the_sections_are_the_same_in_every_script():
    banners = {script.name: [line for line in script.source.splitlines() if line[:4] in ("# ──", "# ══")] for script in SCRIPTS}
    assert all(lines == banners[SCRIPTS[0].name] for lines in banners.values()), banners
    assert len(banners[SCRIPTS[0].name]) == 7
