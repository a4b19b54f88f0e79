"""Makes an animated picture of a trained agent, in real time, in tests/benchmark/figures.

    pip install -r tests/benchmark/requirements.txt
    python tests/benchmark/film.py runs/<run>       # writes figures/<env-id>__<script>.gif
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
FIGURES = Path(__file__).parent / "figures"
SECONDS, FPS = 4, 25


def film(run: Path) -> Path:
    config = json.loads((run / "config.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(run, Path(folder, run.name), ignore=shutil.ignore_patterns("videos"))
        command = [sys.executable, ROOT / f"{config['script']}.py", "--evaluate", copy, "--eval-episodes", "1"]
        subprocess.run([*command, "--capture-video"], check=True)
        (video,) = copy.glob("videos/*/*.mp4")
        fps = imageio.immeta(video)["fps"]
        every = math.ceil(fps / FPS)
        frames = imageio.imread(video)[::every][: round(SECONDS * fps / every)]
    half = frames.reshape(len(frames), frames.shape[1] // 2, 2, frames.shape[2] // 2, 2, 3).mean((2, 4)).astype(np.uint8)
    path = FIGURES / f"{config['args']['env_id'].replace('/', '-')}__{config['script']}.gif"
    first, *others = (Image.fromarray(frame).quantize(32, dither=Image.Dither.NONE) for frame in half)
    first.save(path, save_all=True, append_images=others, duration=1000 * every / fps, loop=0)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    print(film(parser.parse_args().run))


if __name__ == "__main__":
    main()
