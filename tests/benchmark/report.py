"""Makes the README's tables, between its markers, and its figures from the CSV files of the benchmarks.

    pip install -r tests/benchmark/requirements.txt
    python tests/benchmark/report.py
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
FIGURES = HERE / "figures"
SOLVED = "CartPole-v1", 475
STEPS = 1_000_000  # of a curve


def read(path: Path) -> tuple[dict, list[dict[str, str]]]:
    """What made a file of results, and its rows."""
    comment, _, rows = path.read_text().partition("\n")
    return json.loads(comment.removeprefix("# ")), list(csv.DictReader(io.StringIO(rows)))


def runs() -> Iterator[tuple[str, str, str, dict, np.ndarray, np.ndarray]]:
    """(name, environment, seed, what made it, steps, returns) of every cell of the grid that is done"""
    for path in sorted(RESULTS.glob("*/*/*.csv")):
        about, rows = read(path)
        steps, returns = np.array([(int(row["global_step"]), float(row["episodic_return"])) for row in rows]).T
        yield path.parts[-3], path.parts[-2], path.stem, about, steps, returns


def table(header: str, rows: list[tuple]) -> str:
    lines = [header, re.sub(r"[^|]+", "---", header), *("| " + " | ".join(map(str, row)) + " |" for row in rows)]
    return "\n".join(lines)


def number(x: float) -> str:
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}"


def returns_table() -> str:
    """Mean returns of each run: of its last 100 episodes of training, and of 100 without exploration after it."""
    seeds: dict[tuple[str, str], list[tuple[dict, float]]] = {}
    for name, env_id, _, about, _, returns in runs():
        if env_id != SOLVED[0]:
            seeds.setdefault((name, env_id), []).append((about, returns[-100:].mean()))
    rows = [
        (name, env_id, f"{max(about.get('steps', STEPS) for about, _ in trained) / 1e6:.2g}M",
         number(np.mean([mean for _, mean in trained])), " ".join(number(mean) for _, mean in trained),
         " ".join(number(about["evaluated"]) for about, _ in trained if "evaluated" in about) or "not measured",
         ", ".join(f"`{commit}`" for commit in sorted({about["commit"] for about, _ in trained})))
        for (name, env_id), trained in seeds.items()
    ]
    return table("| run | environment | steps | mean | seeds 1, 2, … | the same agents without exploration | commit |", rows)


def solved_table() -> str:
    """Steps until the mean return of 100 episodes has reached what counts as solved."""
    solved, made = {}, {}
    for name, env_id, _, about, steps, returns in runs():
        if env_id == SOLVED[0]:
            means = np.convolve(returns, np.ones(100) / 100, "valid")
            reached = f"{steps[99:][means >= SOLVED[1]][0]:.0f}" if (means >= SOLVED[1]).any() else "never"
            solved.setdefault(name, []).append(reached)
            made.setdefault(name, set()).add(about["commit"])
    rows = [(name, " ".join(steps), ", ".join(f"`{commit}`" for commit in sorted(made[name])))
            for name, steps in solved.items()]
    return table("| run | steps, seeds 1, 2, … | commit |", rows)


def speed_table() -> str:
    """Medians and ranges of steps per second, beside those of the bare environment."""
    about, rows = read(RESULTS / "speed.csv")
    rates: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        rates.setdefault((row["env_id"], row["program"]), []).append(int(row["steps_per_second"]))
    shown = [
        (env_id, program, f"{median(rate):.0f}", f"{min(rate)} – {max(rate)}",
         f"{median(rate) / median(rates[env_id, 'SB3 PPO']):.2f}")
        for (env_id, program), rate in rates.items()
    ]
    return table("| environment | program | steps/s, median | range | against SB3 PPO |", shown)


def curves(env_id: str) -> None:
    """Return against steps: a window of 100 episodes, each seed thin, their mean thick."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [(name, steps, returns) for name, env, _, _, steps, returns in runs() if env == env_id]
    grid = np.linspace(0, max(STEPS, *(steps[-1] for _, steps, _ in shown)), 200)
    seeds: dict[str, list[np.ndarray]] = {}
    for name, steps, returns in shown:
        smooth, right = np.convolve(returns, np.ones(100) / 100, "valid"), None if grid[-1] == STEPS else np.nan
        seeds.setdefault(name, []).append(np.interp(grid, steps[99:], smooth, left=np.nan, right=right))
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for color, (name, lines) in enumerate(seeds.items()):
        axes.plot(grid, np.transpose(lines), color=f"C{color}", linewidth=0.6, alpha=0.5)
        axes.plot(grid, np.mean(lines, axis=0), color=f"C{color}", linewidth=2, label=f"{name} ({len(lines)})")
    axes.set(title=env_id, xlabel="environment steps", ylabel="return, mean of 100 episodes", xlim=(0, grid[-1]))
    axes.grid(alpha=0.3)
    axes.legend(title="run (seeds)", loc="center left", bbox_to_anchor=(1, 0.5))
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{env_id}.png", dpi=120)


def fill(text: str, name: str, content: str) -> str:
    """The README with what stands between the markers <!-- name --> and <!-- /name --> replaced."""
    return re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}\n{content}\n\n{m[2]}", text, flags=re.S)


def readme() -> str:
    text = (ROOT / "README.md").read_text()
    tables = {"returns": returns_table, "solved": solved_table, "speed": speed_table}
    for name, make in tables.items():
        text = fill(text, name, make())
    return text


def main() -> None:
    (ROOT / "README.md").write_text(readme())
    for env_id in sorted({env_id for _, env_id, _, about, *_ in runs() if about.get("steps", STEPS) > 0.9 * STEPS}):
        curves(env_id)


if __name__ == "__main__":
    main()
