"""Makes the tables of both READMEs, between their markers, and the figures from the CSV files of the benchmarks.

    pip install -r tests/benchmark/requirements.txt
    python tests/benchmark/report.py
"""

import csv
import json
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
FIGURES = HERE / "figures"

# The rows of the lecture's table: objective, the lecture's score, and the name in grid.csv.
PPO_TABLE = [
    ("no clipping or penalty", -0.39, "ppo_none"),
    ("clipping, ε = 0.1", 0.76, "ppo_clip_0.1"),
    ("clipping, ε = 0.2", 0.82, "ppo_clip"),
    ("clipping, ε = 0.3", 0.70, "ppo_clip_0.3"),
    ("adaptive KL, d_targ = 0.003", 0.68, "ppo_kl_0.003"),
    ("adaptive KL, d_targ = 0.01", 0.74, "ppo_kl"),
    ("adaptive KL, d_targ = 0.03", 0.71, "ppo_kl_0.03"),
    ("fixed KL, β = 0.3", 0.62, "ppo_kl_fixed_0.3"),
    ("fixed KL, β = 1", 0.71, "ppo_kl_fixed"),
    ("fixed KL, β = 3", 0.72, "ppo_kl_fixed_3"),
    ("fixed KL, β = 10", 0.69, "ppo_kl_fixed_10"),
]
PPO_ENV_IDS = ["HalfCheetah-v4", "Hopper-v4", "InvertedDoublePendulum-v4", "InvertedPendulum-v4", "Reacher-v4",
               "Swimmer-v4", "Walker2d-v4"]
# The lecture's scores on Atari: a random policy, a human, TRPO with single path and with vine; of A3C over 57 games.
ATARI = {
    "BeamRider": (354, 7456, 1425.2, 859.5),
    "Breakout": (1.2, 31.0, 10.8, 34.2),
    "Enduro": (0, 368, 534.6, 430.8),
    "Pong": (-20.4, -3.0, 20.9, 20.9),
    "Qbert": (157, 18900, 1973.5, 7732.5),
    "Seaquest": (110, 28010, 1908.6, 788.4),
    "SpaceInvaders": (179, 3690, 568.4, 450.2),
}
A3C_OF_57_GAMES = {"A3C, FF, 1 day": (344.1, 68.2), "A3C, FF, 4 days": (496.8, 116.6),
                   "A3C, LSTM, 4 days": (623.0, 112.6)}
ATARI_RUNS = {"TRPO, single path": "trpo_atari", "TRPO, vine": "trpo_atari_vine", "A3C, FF": "a3c_atari",
              "A3C, LSTM": "a3c_atari_lstm", "TRPO, single path, 4M steps": "trpo_atari_4M",
              "A3C, FF, 4M steps": "a3c_atari_4M"}
SCRIPTS = "reinforce", "a3c", "trpo", "ppo_clip", "ppo_kl", "ddpg"
CURVES = "Hopper-v4", "Walker2d-v4", "HalfCheetah-v4"
STEP_SIZES = {"reinforce_lr_3e-5": "REINFORCE, α = 0.00003", "reinforce": "REINFORCE, α = 0.001",
              "reinforce_lr_0.1": "REINFORCE, α = 0.1", "trpo": "TRPO, ε = 0.01",
              "trpo_0.5": "TRPO, ε = 0.5", "npg_0.5": "natural gradient, ε = 0.5", "ppo_clip": "PPO"}
WORKERS = {"a3c_1_worker": "1 actor-learner", "a3c": "2 actor-learners"}
DDPG_BATCHES = {"ddpg": 64, "ddpg_batch_256": 256}
PEERS = {"ppo_clip": "PPO", "ppo_kl": "PPO", "trpo": "TRPO", "a3c": "A2C", "ddpg": "DDPG"}  # by name, in any library


class Run(NamedTuple):
    about: dict  # what made it, and what the tables need
    steps: np.ndarray  # every 10,000
    means: np.ndarray  # of the latest 100 episodes

    @property
    def score(self) -> float:
        """What the PPO paper compares: the mean of the last 100 episodes"""
        return self.about["last_100"]


def about(path: Path) -> dict:
    """What made a file of results: its first line, a comment"""
    with path.open() as lines:
        return json.loads(next(lines).removeprefix("# "))


@cache
def runs(name: str, env_id: str) -> list[Run]:
    """A run for each seed that is done"""
    found = []
    for path in sorted((RESULTS / name / env_id.replace("/", "-")).glob("*.csv")):
        columns = np.genfromtxt(path, delimiter=",", skip_header=2, usecols=(0, 4), unpack=True, ndmin=2)
        found.append(Run(about(path), *columns))
    return found


def commits(some: list[Run]) -> str:
    return ", ".join(f"`{commit}`" for commit in sorted({run.about["commit"] for run in some}))


def table(header: str, rows: list[tuple]) -> str:
    lines = [header, re.sub(r"[^|]+", "---", header), *("| " + " | ".join(map(str, row)) + " |" for row in rows)]
    return "\n".join(lines)


def number(x: float) -> str:
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}"


# ── The lecture's identifiers ─────────────────────────────────────────────────────────────────────────────────────

def slides() -> list[dict[str, str]]:
    """Each slide's identifiers, and the file that has their lines"""
    with (ROOT / "tests/slides.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def line_of(identifier: str, path: str) -> int:
    """Where it stands as [identifier] in a comment, below the header"""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    return next(n for n, line in enumerate(lines, 1) if f"[{identifier}]" in line.partition("# ")[2])


def lines_table() -> str:
    rows = []
    for row in slides():
        names, links = row["identifiers"].split(), []
        for name in names:
            family, _, number = name.rpartition("-")
            follows = links and number.isdigit() and names[len(links) - 1] == f"{family}-{int(number) - 1}"
            links.append(f"[{number if follows else name}]({row['file']}#L{line_of(name, row['file'])})")
        title = ": ".join(filter(None, (row["slide"], row["english"])))
        rows.append((title, f"`{Path(row['file']).name}`", " ".join(links)))
    return table("| slide | file | lines |", rows)


# ── The lecture's table ───────────────────────────────────────────────────────────────────────────────────────────

def normalized(scores: dict[str, np.ndarray], random: np.ndarray) -> dict[str, np.ndarray]:
    """scores of each objective (environments, seeds), random policy's (environments,) → 0: random, 1: the best run"""
    best = np.max([score.max(1) for score in scores.values()], axis=0)
    return {name: (score - random[:, None]) / (best - random)[:, None] for name, score in scores.items()}


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """(…,K) → (…): mean of the middle half of K scores (Agarwal et al. 2021, arXiv:2108.13264)"""
    cut = scores.shape[-1] // 4
    return np.sort(scores)[..., cut : scores.shape[-1] - cut].mean(-1)


def interval(scores: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """95% interval by stratified bootstrap: seeds are drawn anew within each environment.   (environments, seeds)"""
    drawn = np.random.default_rng(0).integers(scores.shape[1], size=(10_000, *scores.shape))
    samples = np.take_along_axis(scores[None], drawn, 2).reshape(len(drawn), -1)
    return tuple(np.percentile(statistic(samples), [2.5, 97.5]))


def ppo_table(environments: bool = True) -> str:
    """The lecture's table beside ours; an objective counts as run when every environment has its three seeds."""
    random = np.array([runs("random", env_id)[0].about["mean"] for env_id in PPO_ENV_IDS])
    trained = {name: [runs(name, env_id)[:3] for env_id in PPO_ENV_IDS] for _, _, name in PPO_TABLE}
    done = {name: some for name, some in trained.items() if all(len(seeds) == 3 for seeds in some)}
    scores = {name: np.array([[run.score for run in seeds] for seeds in some]) for name, some in done.items()}
    of, rows = normalized(scores, random) if scores else {}, []
    for objective, lecture, name in PPO_TABLE:
        cells = ["not run", ""]
        if name in of:
            low, high = interval(of[name], lambda x: x.mean(-1))
            iqm_low, iqm_high = interval(of[name], interquartile_mean)
            cells = [f"**{of[name].mean():.2f}** ({low:.2f} – {high:.2f})",
                     f"{interquartile_mean(of[name].flatten()):.2f} ({iqm_low:.2f} – {iqm_high:.2f})"]
            if environments:
                cells += [*(f"{mean:.2f}" for mean in of[name].mean(1)), commits(sum(done[name], []))]
        rows.append((objective, f"{lecture:.2f}", *cells))
    header = "| objective | lecture | ours: mean (95% interval) | interquartile mean |"
    if environments:
        header += "".join(f" {env_id.removesuffix('-v4')} |" for env_id in PPO_ENV_IDS) + " commit |"
    return table(header, rows)


def kl_table() -> str:
    """How far the policies of the penalties' rows moved, and by which β: medians over the iterations, then the seeds."""
    columns = []
    for objective, _, name in PPO_TABLE:
        if name.startswith("ppo_kl") and all(runs(name, env_id) for env_id in PPO_ENV_IDS):
            setting = objective.partition(", ")[2]
            columns.append((f"{setting}: KL", name, "losses/kl"))
            if "fixed" not in name:
                columns.append(("… β", name, "losses/beta"))
    rows = []
    for env_id in PPO_ENV_IDS:
        kept = [[run.about["medians"][loss] for run in runs(name, env_id) if "medians" in run.about]
                for _, name, loss in columns]
        rows.append((env_id, *(f"{median(seeds):.2g}" if seeds else "" for seeds in kept)))
    return table(f"| environment | {' | '.join(title for title, *_ in columns)} |", rows)


# ── The six scripts beside published figures ──────────────────────────────────────────────────────────────────────

def published() -> dict[tuple[str, str, str], tuple[float, str]]:
    """(script, environment, "training" or "evaluation") → the best figure, and whose it is"""
    found: dict[tuple[str, str, str], tuple[float, str]] = {}
    for row in csv.DictReader((HERE / "published.csv").open()):
        cell, new = (row["script"], row["env_id"], row["measured"]), (float(row["return"]), row["source"])
        found[cell] = max(new, found.get(cell, new))
    return found


def returns_table() -> str:
    """Mean returns of the last 100 episodes of training, and of 100 without exploration, each beside its like."""
    rows, best = [], published()
    for env_id in CURVES:
        for script in SCRIPTS:
            trained = runs(script, env_id)
            ours = {"training": [run.score for run in trained], "evaluation": [run.about["evaluated"] for run in trained]}
            cells = []
            for measured, seeds in ours.items():
                figure, source = best.get((script, env_id, measured), (np.nan, ""))
                mean = f"{np.mean(seeds):.0f}" if seeds else "not run"
                cells += [f"**{mean}**" if seeds and np.mean(seeds) >= figure else mean, " ".join(map(number, seeds)),
                          f"{figure:.0f} {source}" if source else ""]
            rows.append((env_id, f"`{script}`", *cells, commits(trained)))
    return table("| environment | script | in training | seeds 1, 2, … | published | evaluated | seeds 1, 2, … "
                 "| published | commit |", rows)


def short_returns_table() -> str:
    """The means of returns_table, a row per script: ours / published"""
    rows, best = [], published()
    for script in SCRIPTS:
        cells = []
        for env_id in CURVES:
            trained = runs(script, env_id)
            for measured, seeds in (("training", [run.score for run in trained]),
                                    ("evaluation", [run.about["evaluated"] for run in trained])):
                figure, _ = best.get((script, env_id, measured), (np.nan, ""))
                mean = f"**{np.mean(seeds):.0f}**" if np.mean(seeds) >= figure else f"{np.mean(seeds):.0f}"
                cells.append(mean if np.isnan(figure) else f"{mean} / {figure:.0f}")
        rows.append((f"`{script}`", *cells))
    return table("| script | " + " | ".join(f"{env_id}: in training | evaluated" for env_id in CURVES) + " |", rows)


def atari_scores() -> dict[str, list[float]]:
    """Of each method the games' scores: the lecture's, and ours as the mean of the last 100 episodes in training"""
    lecture = zip(("random", "human", *ATARI_RUNS), np.array([*ATARI.values()]).T)
    scores = {f"{name}: the lecture's": of for name, of in lecture}
    for name, row in ATARI_RUNS.items():
        scores[name] = np.array([runs(row, f"ALE/{game}-v5")[0].score if runs(row, f"ALE/{game}-v5") else np.nan
                                 for game in ATARI])
    return scores


def atari_table() -> str:
    rows = []
    for name, scores in atari_scores().items():
        trained = sum((runs(ATARI_RUNS[name], f"ALE/{game}-v5") for game in ATARI if name in ATARI_RUNS), [])
        rows.append((name, *("not run" if np.isnan(x) else number(x) for x in scores), commits(trained)))
    return table(f"| | {' | '.join(ATARI)} | commit |", rows)


def human_table() -> str:
    """Human-normalised, a random policy has 0%, a human 100%; of the methods that were run on all seven games"""
    rows = [(name, 57, mean, middle) for name, (mean, middle) in A3C_OF_57_GAMES.items()]
    (_, random), (_, human), *others = atari_scores().items()
    for name, of in others:
        shares = 100 * (of - random) / (human - random)
        if not np.isnan(shares).any():
            rows.append((name, len(shares), f"{np.mean(shares):.1f}", f"{np.median(shares):.1f}"))
    return table("| | games | mean, % | median, % |", rows)


def highest(some: list[Run]) -> float:
    """Mean of the seeds' latest 10 episodes, each 5000 steps: the highest"""
    shortest = min(len(run.about["latest_10"]) for run in some)
    return np.nanmax(np.mean([run.about["latest_10"][:shortest] for run in some], axis=0))


def highest_table() -> str:
    """ddpg's returns by batch, also at the best of times, as published evaluations are; its noise is small enough."""
    rows, best = [], published()
    for env_id in CURVES:
        in_training, evaluated = (best["ddpg", env_id, measured] for measured in ("training", "evaluation"))
        for name, batch in DDPG_BATCHES.items():
            if trained := runs(name, env_id):
                ours = [[run.score for run in trained], [run.about["evaluated"] for run in trained], highest(trained)]
                last, final, peak = (f"{np.mean(figures):.0f}" for figures in ours)
                rows.append((env_id, batch, len(trained), last, "{:.0f} {}".format(*in_training), final, peak,
                             "{:.0f} {}".format(*evaluated)))
    return table("| environment | batch | seeds | in training | published | evaluated at the end | highest in training "
                 "| published, highest evaluation |", rows)


def others_table() -> str:
    rows = []
    for path in sorted(RESULTS.glob("*/*/")):
        name, env_id = path.parts[-2:]
        trained = runs(name, env_id)
        elsewhere = name in ("random", *ATARI_RUNS.values()) or env_id == "CartPole-v1" or name in SCRIPTS and env_id in CURVES
        if not elsewhere:
            rows.append((name, env_id, f"{max(run.about['steps'] for run in trained) / 1e6:.2g}M",
                         " ".join(number(run.score) for run in trained),
                         " ".join(number(run.about["evaluated"]) for run in trained if "evaluated" in run.about), commits(trained)))
    return table("| run | environment | steps | seeds 1, 2, … | without exploration | commit |", rows)


def solved_table() -> str:
    """Steps until the mean return of 100 episodes on CartPole-v1 has reached 475, which counts as solved."""
    rows = []
    for path in sorted(RESULTS.glob("*/CartPole-v1")):
        trained, cells = runs(path.parent.name, path.name), []
        for run in trained:
            solved = "solved" in run.about
            cells.append((f"{run.about['solved']}", f"{run.about['afterwards']:.0f}") if solved else ("never", "–"))
        rows.append((path.parent.name, *map(" ".join, zip(*cells)), commits(trained)))
    return table("| run | steps, seeds 1, 2, … | mean return afterwards | commit |", rows)


# ── Speed ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def measurements(name: str) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """(environment, program) → (steps per second, megabytes) of every repeat"""
    measured: dict[tuple[str, str], list[tuple[int, int]]] = {}
    _, *lines = (RESULTS / f"{name}.csv").read_text().splitlines()
    for row in csv.DictReader(lines):
        cell = row["env_id"], row["program"]
        measured.setdefault(cell, []).append((int(row["steps_per_second"]), int(row["peak_mb"])))
    return measured


def short_speed_table(env_id: str = "Hopper-v4") -> str:
    """A row per script: medians, with --compile where there is one, and the fastest peer"""
    rates = {program: f"{median(rate for rate, _ in repeats):.0f}"
             for (where, program), repeats in measurements("speed").items() if where == env_id}
    rows = []
    for script, flags in (("reinforce", ""), ("a3c", " --num-workers 2"), ("trpo", ""), ("ppo_clip", ""), ("ppo_kl", ""),
                          ("ddpg", " --learning-starts 1000")):
        peers = [peer for peer in peers_of(script) if peer in rates]
        fastest = max(peers, key=lambda peer: int(rates[peer]), default="")
        rows.append((f"`{script}`", rates[script + flags], rates.get(f"{script}{flags} --compile", ""), fastest,
                     rates.get(fastest, "")))
    return table("| script | steps/s | with `--compile` | fastest peer | its steps/s |", rows)


def speed_table(name: str = "speed") -> str:
    """Each program's medians and ranges, and each script beside the fastest of its peers and the bare environment."""
    measured, rows = measurements(name), []
    rates = {cell: median(rate for rate, _ in repeats) for cell, repeats in measured.items()}
    for (env_id, program), repeats in measured.items():
        rate, share = rates[env_id, program], f"{rates[env_id, program] / rates[env_id, 'environment']:.0%}"
        low, *_, high = sorted(rate for rate, _ in repeats)
        others = {other: rates[env_id, other] for other in peers_of(program) if (env_id, other) in rates}
        fastest = max(others, key=others.get, default="")
        beside = (fastest, f"{others[fastest]:.0f}", f"{rate / others[fastest]:.2f}") if fastest else ("", "", "")
        rows.append((env_id, program, f"{rate:.0f}", f"{low} – {high}", share, max(mb for _, mb in repeats), *beside))
    return table("| environment | program | steps/s | range | of the environment's | MB | fastest peer | its steps/s "
                 "| times as fast |", rows)


def peers_of(program: str) -> list[str]:
    """What other libraries have for the script, with one actor and with several, and as large a minibatch"""
    name, *flags = program.split()
    if name not in PEERS:
        return []
    more = [", batch 256"] if "256" in flags else ["", ", 2 actors", ", 8 actors"]
    return [f"{library} {PEERS[name]}{these}" for library in ("SB3", "SBX") for these in more]


def growth_table() -> str:
    """Steps per second and megabytes of each script by its number of actors."""
    cells: dict[str, dict[int, str]] = {}
    for (_, program), repeats in measurements("growth").items():
        name, *flags = program.split()
        rate, mb = median(rate for rate, _ in repeats), max(mb for _, mb in repeats)
        if flags[0].startswith("--num-"):
            cells.setdefault(name, {})[int(flags[1])] = f"{rate:.0f} ({mb})"
        else:
            cells[program] = {1: f"{rate:.0f} ({mb})"}
    actors = sorted({n for found in cells.values() for n in found})
    return table("| script | " + " | ".join(map(str, actors)) + " |",
                 [(name, *(found.get(n, "") for n in actors)) for name, found in cells.items()])


def cuda_table() -> str:
    """Steps per second of each script on the CPU and on the GPU, of the repeats that both have."""
    measured, rows = measurements("cuda"), []
    for (env_id, program), repeats in measured.items():
        name, _, device = program.rpartition(" ")
        if device == "--cuda":
            pairs = [(cpu, gpu) for (cpu, _), (gpu, _) in zip(measured[env_id, f"{name} --no-cuda"], repeats)]
            cpu, gpu = map(median, zip(*pairs))
            rows.append((env_id, name, f"{cpu:.0f}", f"{gpu:.0f}", f"{gpu / cpu:.2f}"))
    return table("| environment | program | steps/s on the CPU | … on the GPU | times as fast |", rows)


# ── Figures ───────────────────────────────────────────────────────────────────────────────────────────────────────

def figure(file: str, env_id: str, names: dict[str, str], minutes: bool = False) -> None:
    """Return against steps, or minutes: means of 100 episodes, each seed thin, their mean thick."""
    if not all(runs(name, env_id) for name in names):  # a picture waits until all that it compares has been run
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for color, (name, label) in enumerate(names.items()):
        trained = runs(name, env_id)
        units = [60 * run.about["steps_per_second"] if minutes else 1e6 for run in trained]
        grid = np.linspace(0, min(run.about["steps"] / unit for run, unit in zip(trained, units)), 200)
        lines = [np.interp(grid, run.steps / unit, run.means, left=np.nan) for run, unit in zip(trained, units)]
        axes.plot(grid, np.transpose(lines), color=f"C{color}", linewidth=0.6, alpha=0.5)
        axes.plot(grid, np.mean(lines, axis=0), color=f"C{color}", linewidth=2, label=f"{label} ({len(lines)})")
    axes.set(title=env_id, xlabel="minutes" if minutes else "million steps", ylabel="return, mean of 100 episodes")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(title="runs (seeds)", loc="center left", bbox_to_anchor=(1, 0.5))
    FIGURES.mkdir(exist_ok=True)
    picture.savefig(FIGURES / f"{file}.png", dpi=120)


TABLES = {
    "README.md": {"lines": lines_table, "returns": short_returns_table,
                  "ppo": partial(ppo_table, environments=False), "speed": short_speed_table},
    "tests/benchmark/README.md": {"returns": returns_table, "speed": speed_table, "growth": growth_table,
                                  "cuda": cuda_table, "highest": highest_table, "ppo": ppo_table, "kl": kl_table,
                                  "atari": atari_table, "human": human_table,
                                  "atari-speed": partial(speed_table, "atari"), "others": others_table,
                                  "solved": solved_table},
}


def filled(path: str) -> str:
    """The file's text with what stands between its markers <!-- name --> and <!-- /name --> made anew."""
    text = (ROOT / path).read_text()
    for name, make in TABLES[path].items():
        pattern, content = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", make()
        assert re.search(pattern, text, re.S), f"{path} has no markers for {name}"
        text = re.sub(pattern, lambda found: f"{found[1]}\n{content}\n\n{found[2]}", text, flags=re.S)
    return text


def main() -> None:
    for path in TABLES:
        (ROOT / path).write_text(filled(path))
    for env_id in CURVES:
        figure(env_id, env_id, {script: script for script in SCRIPTS})
    figure("step-sizes", "Hopper-v4", STEP_SIZES)
    figure("workers", "Hopper-v4", WORKERS, minutes=True)
    figure("ALE-Pong-v5", "ALE/Pong-v5", {row: name for name, row in ATARI_RUNS.items() if "4M" not in name})


if __name__ == "__main__":
    main()
