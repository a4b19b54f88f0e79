"""What several scripts need is the same text in each, so that their diff is the difference of their algorithms."""

import ast
import importlib
import re
from collections import Counter, defaultdict

import pytest
import torch
from helpers import SCRIPTS

# What is an algorithm's own although another script has something of that name.
OWN = {
    "a3c": {"Args.env_id", "Args.seed", "Args.learning_rate", "Args.ent_coef", "Args.max_grad_norm", "Args.cuda",
            "Args.__post_init__", "make_env", "Agent.__init__", "Agent.noise", "Agent.act", "score_loss", "train", "evaluate",
            "main"},
    "ddpg": {"Args.env_id", "Args.num_envs", "Args.__post_init__", "make_env", "mlp", "Agent.__init__", "Agent.act",
             "collect", "update", "train"},
    "reinforce": {"Args.seed", "Args.num_envs", "Args.learning_rate", "Args.value_lr", "Args.__post_init__",
                  "Agent.__init__", "log_prob", "collect", "update", "train"},
    "trpo": {"Args.num_steps", "Args.compile", "Args.gae_lambda", "Args.minibatch_size", "Args.update_epochs",
             "Args.env_id", "Args.__post_init__", "make_env", "Agent.__init__", "gae", "collect", "update", "train"},
    "ppo_clip": {"minibatch_gradient", "update", "train"},
    "ppo_kl": {"Args.__post_init__", "Agent.__init__", "update", "train"},
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


def test_the_sections_are_the_same_in_every_script():
    banners = {script.name: re.findall(r"^# [─═]{2} (.*?) [─═]+$", script.source, re.M) for script in SCRIPTS}
    assert all(titles == banners["ppo_clip"] for titles in banners.values()), banners
    assert banners["ppo_clip"][:2] == ["Arguments", "Environments"] and len(banners["ppo_clip"]) == 7


def test_the_two_that_play_atari_make_their_environments_in_the_same_way():
    a3c, trpo = (script for script in SCRIPTS if script.name in ("a3c", "trpo"))
    texts = [re.search(r"^def make_env.*?(?=^\S)", script.source, re.M | re.S)[0] for script in (a3c, trpo)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["a3c", "trpo", "ppo_clip", "ppo_kl", "reinforce"])
@pytest.mark.parametrize("log_std", [None, torch.zeros(3)], ids=["discrete", "continuous"])
def test_log_prob_refuses_fewer_actions_than_states_and_actions_that_are_none(name, log_std):
    log_prob = importlib.import_module(name).log_prob
    actions = torch.zeros(4, dtype=torch.long) if log_std is None else torch.zeros(4, 3)
    with pytest.raises(RuntimeError):
        log_prob(torch.zeros(5, 3), log_std, actions)
    if log_std is None:
        for action in (-1, 3):
            with pytest.raises(RuntimeError):
                log_prob(torch.zeros(1, 3), None, torch.tensor([action]))


@pytest.mark.parametrize("name", ["trpo", "ppo_clip", "ppo_kl"])
def test_gae_of_whole_rewards_is_not_cut_to_whole_numbers(name):
    rewards, values, ends = torch.ones(4, 2).long(), torch.rand(2, 4, 2).double(), torch.zeros(2, 4, 2, dtype=torch.bool)
    of = importlib.import_module(name).gae
    torch.testing.assert_close(of(rewards, *values, *ends, 0.9, 0.8), of(rewards.double(), *values, *ends, 0.9, 0.8))
