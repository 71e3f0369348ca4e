"""Tutorial: from your own images to a table."""

# %%
# # From your own images to a table
#
# Turn a folder of images into a dataset, train your own network on it, certify and attack it, and compare it with
# another method in a LaTeX table.
#
# The images of this tutorial are drawn: gray disks, squares and crosses of 12 x 12 pixels, with noise. They are files
# in one folder per class, as your images may be.
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import nn
from torchvision.datasets import ImageFolder

import linflab
from linflab.models.networks import NetworkConfig, Normalize
from linflab.platform.data.datasets import load_dataset

generator = np.random.default_rng(0)
rows, columns = np.mgrid[:12, :12]


def draw(kind: str) -> Image.Image:
    """Return a gray image of a bright shape at a random position."""
    y, x = abs(rows - generator.integers(4, 8)), abs(columns - generator.integers(4, 8))
    shape = {
        "disk": y**2 + x**2 <= 10,
        "square": np.maximum(y, x) == 3,
        "cross": (np.minimum(y, x) == 0) & (y + x < 5),
    }
    return Image.fromarray((130 * shape[kind] + generator.integers(0, 100, (12, 12))).astype(np.uint8))


for split, count in (("train", 400), ("test", 100)):
    for kind in ("cross", "disk", "square"):
        folder = Path("images", split, kind)
        folder.mkdir(parents=True)
        for number in range(count):
            draw(kind).save(folder / f"{number}.png")
print(*sorted(path.as_posix() for path in Path("images").glob("*/*")), sep="\n")

# %%
# ## Make a dataset
#
# A dataset is a folder in `$LINFLAB_DATA` with four arrays: uint8 images (N, C, H, W) and labels. Its name is the name
# of the folder. A tenth of the training images is held out for validation, the same tenth in every run.
os.environ["LINFLAB_DATA"] = str(Path("datasets").absolute())
target = Path("datasets", "shapes")
target.mkdir(parents=True)
for split in ("train", "test"):
    samples = ImageFolder(f"images/{split}")
    images = np.stack([np.asarray(image.convert("L"))[None] for image, _ in samples])
    np.save(target / f"{split}_images.npy", images)
    np.save(target / f"{split}_labels.npy", np.array(samples.targets))
data = load_dataset("shapes")
print(data.info.input_shape, data.info.classes, len(data.train), len(data.validation), len(data.test))


# %%
# ## Your own network
#
# A network has a config class with its own `kind`. Defining the class registers it, so recipes and overrides accept it
# in this process. [Your own parts](../how-to/own-parts.md) explains how the command line accepts it too.
class TwoConvConfig(NetworkConfig):
    """Settings of a network with two convolutions."""

    has_relu: ClassVar[bool] = True

    kind: Literal["two_conv"] = Field("two_conv", description="a network with two convolutions")
    width: int = Field(8, ge=1, description="channels of the first convolution")

    def build(
        self, input_shape: Sequence[int], classes: int, mean: Sequence[float] = (0.0,), std: float = 1.0
    ) -> nn.Module:
        """Build the network for images of this shape, with normalization as its first layer."""
        channels, height, width = input_shape
        size = 2 * self.width * (height // 4) * (width // 4)
        convolutions = (
            nn.Conv2d(channels, self.width, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(self.width, 2 * self.width, 4, 2, 1),
        )
        return nn.Sequential(
            Normalize(mean, std),
            *convolutions,
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(size, 64),
            nn.ReLU(),
            nn.Linear(64, classes),
        )


# %%
# ## Train
#
# A shipped recipe gives all other settings, among them eps = 0.1. `dataset` selects your images, and `method` names the
# row of the table. `linflab.train` trains, evaluates on the test images, and logs the run, as `linflab train` does.
settings = ["dataset=shapes", "training.epochs=20"]
run = linflab.train("digits_eps0.1_ibp", [*settings, "model.kind=two_conv", "method=IBP two_conv"], name="own")
for name in ("clean", "robust", "certified"):
    print(f"test {name} accuracy {run.metrics[f'test/{name}_accuracy']:.2%}")

# %%
# ## Certify and attack images
#
# The network of the run is an `nn.Module` in evaluation mode. The true robust accuracy lies between the certified
# accuracy and the accuracy under attack. [Other certifiers](../concepts/certifiers.md) may narrow the gap.
images, labels = data.test.batch(torch.arange(len(data.test)))
for eps in (0.05, 0.1, 0.15):
    certificates = linflab.certify(run.network, images, labels, eps=eps)
    attacked = linflab.attack(run.network, images, labels, eps=eps)
    print(f"eps={eps}: certified {certificates.certified_accuracy:.2%}, robust {attacked.robust_accuracy:.2%}")

# %%
# ## Train another method
#
# An l_inf-dist net on the same images, with the same number of epochs.
other = linflab.train("digits_eps0.1_linf_dist_net", settings, name="other")
print(f"test certified accuracy {other.metrics['test/certified_accuracy']:.2%}")

# %%
# ## The table
#
# The table has a row for each method, as mean ± standard deviation if you train more seeds (`seed=1`, `seed=2`). The
# command prints it with its notes, and writes it as Markdown, LaTeX, HTML and CSV.
Path("table.yaml").write_text("""\
title: Shapes
columns: [Method, Model, FLOPs, Clean, Robust, Certified]
groups: [{dataset: shapes, eps: 0.1}]
measured: {group_by: [method], min_seeds: 1}
""")
report = ["linflab", "report", "table", "table.yaml", "--output-dir", "tables"]
subprocess.run(report, check=True, stdout=subprocess.DEVNULL)
latex = Path("tables/table-table.tex").read_text()
print(latex[latex.index(r"\begin{tabular}") : latex.index(r"\end{tabular}")] + r"\end{tabular}")

# %%
# ## Next
#
# - [Compare methods over seeds](../how-to/compare.md) trains recipes with several seeds.
# - [Prepare data](../how-to/data.md) has the rules for datasets.
