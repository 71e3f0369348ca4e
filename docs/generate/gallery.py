"""Draws the figures of the gallery with linflab's own commands, into docs/images/gallery.

Run it after a change of figures: python docs/generate/gallery.py. It trains one small network, which takes minutes.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
SHORT = ("training.epochs=30", "evaluation.attack.steps=20")
COMMANDS = (
    ("runs", "import", str(ROOT / "reports" / "papers" / "measured.jsonl")),
    ("train", "digits_eps0.1_linf_dist_net", *SHORT, "--name", "one"),
    ("evaluate", "one", "--radii-dir", "radii", "evaluation.attack.steps=20"),
    ("report", "run", "one", "--output-dir", "run"),
    ("report", "sweep", "mnist_race", "--output-dir", "sweep"),
)
FIGURES = {
    "learning_curves": "run/*_learning_curves.png",
    "training_margins": "run/*_training_margins.png",
    "certified_accuracy": "radii/certified_accuracy.png",
    "radius_histogram": "radii/radius_histogram.png",
    "sweep_front": "sweep/*_front.png",
    "sweep_importance": "sweep/*_importance.png",
    "sweep_slices": "sweep/*_slices.png",
}
COLORS = 64  # of the palette, which makes files a fifth as large


def draw_gallery(folder: Path) -> None:
    """Run the commands in a temporary folder, and write all figures to a folder."""
    program = str(Path(sys.executable).with_name("linflab"))
    environment = {name: value for name, value in os.environ.items() if name != "LINFLAB_STORAGE"}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for command in COMMANDS:
            subprocess.run([program, *command], cwd=temporary, env=environment, check=True)
        for name, pattern in FIGURES.items():
            (path,) = Path(temporary).glob(pattern)
            with Image.open(path) as image:
                image.convert("RGB").quantize(COLORS).save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    draw_gallery(ROOT / "docs" / "images" / "gallery")
