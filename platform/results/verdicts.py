"""Verdicts on images, kept on disk as they arrive, so that a certification can be interrupted and resumed."""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from linflab.models.robustness.certification import Verdict
from linflab.platform.data.datasets import SplitName
from linflab.platform.errors import InputError, RunLockedError
from linflab.platform.files import open_regular, read_text
from linflab.platform.locks import file_lock
from linflab.reports.outputs import write_text_atomic, write_whole

FILE, PLAN, ADVERSARIAL = "verdicts.jsonl", "plan.json", "adversarial"


@dataclass(frozen=True)
class ImageVerdict:
    """Verdict on one image of a split; see `Verdict`.

    Attributes:
        image: Position in the split.
        label: True class.
        status: certified, falsified, unknown or error.
        certifier: Stage that decided.
        seconds: Duration.
        message: The error; empty without one.
    """

    image: int
    label: int
    status: str
    certifier: str
    seconds: float
    message: str = ""

    @classmethod
    def of(cls, image: int, label: int, verdict: Verdict) -> Self:
        """Return the record of a verdict, without the adversarial image."""
        return cls(image, label, verdict.status, verdict.certifier, verdict.seconds, verdict.message)


@dataclass(frozen=True)
class VerdictPlan:
    """What determines verdicts, besides the machine: verdicts of equal plans can be mixed.

    Attributes:
        version: Version of linflab.
        weights: SHA-256 of the weights file.
        images: SHA-256 of the images and labels of the split.
        dataset: Name of the dataset.
        split: Which of its images are certified.
        eps: Radius for pixel values in [0, 1].
        sound: Whether certificates account for float32 rounding.
        time_limit: Seconds of branch and bound per image.
        max_subproblems: Subproblems per image; None: no limit.
    """

    version: str
    weights: str
    images: str
    dataset: str
    split: SplitName
    eps: float
    sound: bool
    time_limit: float
    max_subproblems: int | None

    @property
    def key(self) -> str:
        """Hash of 16 hexadecimal digits, the name of the plan's folder."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]


class VerdictStore:
    """Folder of verdicts: one line of JSON for each image, and the adversarial images as arrays.

    A line is written only after everything that it refers to. A line that is cut off by a kill is dropped.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.verdicts: dict[int, ImageVerdict] = {}

    @classmethod
    @contextmanager
    def open(cls, root: Path, plan: VerdictPlan) -> Iterator[Self]:
        """Lock and read the folder of a plan; create it if missing.

        Raises:
            InputError: If the folder cannot be created, or a file in it is damaged.
            RunLockedError: If another process writes to it.
        """
        store = cls(root / plan.key)
        with ExitStack() as stack:
            try:
                has_lock = stack.enter_context(file_lock(store.folder / "lock"))
                if has_lock:
                    write_text_atomic(store.folder / PLAN, json.dumps(dataclasses.asdict(plan), indent=1))
                    (store.folder / ADVERSARIAL).mkdir(exist_ok=True)
                    store._read()
            except OSError as error:
                raise InputError(f"{store.folder}: {error.strerror or error}; use another storage directory") from None
            if not has_lock:
                raise RunLockedError(
                    f"{store.folder}: another process certifies the same images; wait until it has ended"
                )
            yield store

    def add(self, record: ImageVerdict, adversarial: np.ndarray | None) -> None:
        """Keep the verdict on an image, and the adversarial image (C, H, W) or (D,) if it has one."""
        if adversarial is not None:
            buffer = io.BytesIO()
            np.save(buffer, adversarial)
            write_whole(self.adversarial_path(record.image), lambda file: file.write(buffer.getvalue()))
        line = json.dumps(dataclasses.asdict(record)) + "\n"
        with (self.folder / FILE).open("a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.verdicts[record.image] = record

    def adversarial_path(self, image: int) -> Path:
        """Return the path of the adversarial image at a position of the split."""
        return self.folder / ADVERSARIAL / f"{image}.npy"

    def read_adversarial(self, image: int) -> np.ndarray:
        """Return an adversarial image (C, H, W) or (D,)."""
        with open_regular(self.adversarial_path(image)) as file:
            array: np.ndarray = np.load(file, allow_pickle=False)
        return array

    def _read(self) -> None:
        path = self.folder / FILE
        if not path.exists():
            return
        text = read_text(path)
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            os.truncate(path, len(complete.encode()))
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                record = ImageVerdict(**json.loads(line))
            except (TypeError, ValueError):
                raise InputError(
                    f"{path}: line {number} is damaged; delete the folder {self.folder} to certify its images again"
                ) from None
            self.verdicts[record.image] = record


def as_columns(verdicts: list[ImageVerdict]) -> dict[str, list[Any]]:
    """Return verdicts as columns of plain data."""
    return {field.name: [getattr(one, field.name) for one in verdicts] for field in dataclasses.fields(ImageVerdict)}
