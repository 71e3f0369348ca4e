"""Cascade: certifiers and an attack, from cheap to complete, decide images one by one."""

import time
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.models.robustness.certification.alpha_crown import AlphaCROWNCertifier
from linflab.models.robustness.certification.base import Certifier, CertifierSettings
from linflab.models.robustness.certification.complete import CompleteCertifier, CompleteSettings
from linflab.models.robustness.certification.crown import CROWNCertifier
from linflab.models.robustness.certification.ibp import IBPCertifier
from linflab.models.robustness.certification.lipschitz import LipschitzCertifier
from linflab.models.robustness.inputs import check_batch, check_eps, check_logits, compute_logits
from linflab.models.robustness.margins import margin

FORWARD, ATTACK = "forward", "attack"  # stages that are no certifiers


class CascadeSettings(CertifierSettings):
    """Settings of the cascade."""

    time_limit: float = Field(30.0, gt=0, description="seconds of branch and bound per image; inf: no limit")
    max_subproblems: int | None = Field(
        None, ge=0, description="subproblems per image, a limit with the same effect on any machine; null: no limit"
    )


class Verdict(NamedTuple):
    """Result of the cascade for one image.

    Attributes:
        status: certified: all images within eps have the true class; falsified: one of them has not; unknown: no stage
            decided within its limits; error: a stage failed, and no other one decided.
        certifier: Stage that decided or failed, or the last stage if none did: `forward` for misclassified images,
            `attack`, or the name of a certifier.
        seconds: Duration. Stages that process several images at once count equally for each.
        adversarial: (C, H, W) or (D,) misclassified image within eps, if falsified.
        message: The error.
    """

    status: Literal["certified", "falsified", "unknown", "error"]
    certifier: str
    seconds: float
    adversarial: Tensor | None = None
    message: str = ""


class _Stage(NamedTuple):
    """Stage of the cascade; `run` returns certificates (B,) and adversarial images by position."""

    name: str
    run: Callable[[Tensor, Tensor, float], tuple[Tensor, dict[int, Tensor]]]


class CascadeCertifier(Certifier):
    """Certifier by lipschitz, ibp, crown, an attack, alpha_crown and complete, in this order.

    Each stage gets the images that no earlier stage decided. Certifiers that do not support the network are left out.
    A radius is the larger one of lipschitz and complete, which starts at those of ibp and crown.
    """

    kind: ClassVar[str] = "cascade"
    bisects: ClassVar[bool] = True
    settings_class: ClassVar[type[CertifierSettings]] = CascadeSettings
    settings: CascadeSettings

    def __init__(self, network: nn.Module, sound: bool = True, settings: CertifierSettings | None = None) -> None:
        super().__init__(network, sound, settings)
        limits = self.settings.model_dump()
        complete_settings = CompleteSettings(**limits, attack_restarts=0)  # the attack is a stage of its own
        self._attack = CompleteCertifier(network, sound, CompleteSettings(**limits))
        tracing = (
            IBPCertifier(network, sound),
            CROWNCertifier(network, sound),
            AlphaCROWNCertifier(network, sound),
            CompleteCertifier(network, sound, complete_settings),
        )
        for one in tracing:
            one.share_traces(self._attack)
        self._certifiers: tuple[Certifier, ...] = (LipschitzCertifier(network, sound), *tracing)
        self._supporting: dict[torch.Size, list[Certifier]] = {}

    @strict_float32()
    @torch.no_grad()
    def judge(
        self,
        images: Tensor,
        labels: Tensor,
        eps: float,
        on_verdict: Callable[[int, Verdict], None] = lambda position, verdict: None,
        cheap_only: bool = False,
    ) -> list[Verdict]:
        """Return the verdict on each image.

        Args:
            images: (B, C, H, W) or flat (B, D), pixel values in [0, 1].
            labels: (B,) true classes, of any integer dtype.
            eps: Radius of the l_inf ball, for pixel values in [0, 1].
            on_verdict: Called with the position and verdict of each image as soon as it is decided.
            cheap_only: Stop after the attack, to estimate the cost of all stages.

        Raises:
            TypeError: If no certifier supports the network, or an argument has the wrong type or dtype.
            ValueError: If the network is in training mode, or shapes, pixel values, labels or eps are invalid.
        """
        labels, eps = check_batch(self.network, images, labels), check_eps(eps)
        if not len(images):
            return []
        stages = self._stages(images[:1], labels[:1], cheap_only)
        verdicts: dict[int, Verdict] = {}
        errors: dict[int, tuple[str, str]] = {}  # stage and message, by position
        seconds = [0.0] * len(images)
        for stage in stages:
            remaining = [k for k in range(len(images)) if k not in verdicts]
            # Branch and bound reports each image before it starts the next one.
            sizes = 1 if stage.name == CompleteCertifier.kind else max(1, len(remaining))
            for start in range(0, len(remaining), sizes):
                part = remaining[start : start + sizes]
                begin = time.monotonic()
                results = _run(stage, images[part], labels[part], eps)
                duration = (time.monotonic() - begin) / len(part)
                for k, (status, adversarial, message) in zip(part, results, strict=True):
                    seconds[k] += duration
                    if status == "error":
                        errors.setdefault(k, (stage.name, message))
                    if status in ("unknown", "error") and stage is not stages[-1]:
                        continue
                    name = stage.name
                    if status in ("unknown", "error") and k in errors:  # no other stage has decided
                        status, (name, message) = "error", errors[k]
                    verdicts[k] = Verdict(status, name, seconds[k], adversarial, message)
                    on_verdict(k, verdicts[k])
        return [verdicts[k] for k in range(len(images))]

    def _certify(self, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        results = [verdict.status == "certified" for verdict in self.judge(images, labels, eps)]
        return torch.tensor(results, dtype=torch.bool, device=images.device)

    def _compute_radius(self, images: Tensor, labels: Tensor) -> Tensor:
        if not len(images):
            return self._attack.compute_radius(images, labels)
        selected = self._select(images[:1], labels[:1])
        if isinstance(selected[-1], CompleteCertifier):  # starts at the radii of IBP and CROWN, and extends them
            selected = [one for one in selected if isinstance(one, LipschitzCertifier)] + [self._attack]
        return torch.stack([one.compute_radius(images, labels).double() for one in selected]).amax(dim=0)

    def _stages(self, image: Tensor, label: Tensor, cheap_only: bool) -> list[_Stage]:
        """Return the stages that support the network, for images like this one."""
        certifiers = self._select(image, label)
        expensive = AlphaCROWNCertifier, CompleteCertifier
        stages = [_Stage(one.kind, _certificates(one)) for one in certifiers]
        first_expensive = next((k for k, one in enumerate(certifiers) if isinstance(one, expensive)), len(stages))
        attacks = [_Stage(ATTACK, self._find_adversarial)] if isinstance(certifiers[-1], CompleteCertifier) else []
        later = [] if cheap_only else stages[first_expensive:]
        return [_Stage(FORWARD, self._classify), *stages[:first_expensive], *attacks, *later]

    def _select(self, image: Tensor, label: Tensor) -> list[Certifier]:
        """Return the certifiers that support the network.

        Raises:
            TypeError: If there is none.
        """
        selected = self._supporting.get(image.shape)
        if selected is None:
            selected, errors = [], list[TypeError]()
            for certifier in self._certifiers:
                try:
                    certifier.certify(image, label, 0.0)
                except TypeError as error:
                    errors.append(error)
                else:
                    selected.append(certifier)
            if not selected:
                raise TypeError(str(errors[1]).replace("certifier=ibp", "certifier=cascade"))
            self._supporting[image.shape] = selected
        return selected

    def _classify(self, images: Tensor, labels: Tensor, eps: float) -> tuple[Tensor, dict[int, Tensor]]:
        """Find misclassified images; those with infinite or NaN logits are left to later stages."""
        logits = compute_logits(self.network, images)
        check_logits(logits, labels)
        is_wrong = logits.isfinite().all(dim=1) & ~(margin(logits, labels) > 0)
        return torch.zeros_like(is_wrong), {k: images[k] for k in is_wrong.nonzero()[:, 0].tolist()}

    def _find_adversarial(self, images: Tensor, labels: Tensor, eps: float) -> tuple[Tensor, dict[int, Tensor]]:
        found = {}
        for k in range(len(images)):
            adversarial = self._attack.find_adversarial(images[k : k + 1], labels[k : k + 1], eps)
            if adversarial is not None:
                found[k] = adversarial
        return torch.zeros_like(labels, dtype=torch.bool), found


def _certificates(certifier: Certifier) -> Callable[[Tensor, Tensor, float], tuple[Tensor, dict[int, Tensor]]]:
    """Return the stage function of a certifier."""

    def run(images: Tensor, labels: Tensor, eps: float) -> tuple[Tensor, dict[int, Tensor]]:
        if isinstance(certifier, CompleteCertifier) and len(images) == 1:
            decision = certifier.decide(images, labels, eps)
            found = {} if decision.adversarial is None else {0: decision.adversarial}
            return torch.tensor([decision.status == "certified"]), found
        return certifier.certify(images, labels, eps), {}

    return run


def _run(
    stage: _Stage, images: Tensor, labels: Tensor, eps: float
) -> Sequence[tuple[Literal["certified", "falsified", "unknown", "error"], Tensor | None, str]]:
    """Run a stage on images; if it fails, run it on each image alone, so that an error concerns one image only."""
    try:
        certified, adversarial = stage.run(images, labels, eps)
    except Exception as error:  # an image with an error must not end the others
        if len(images) == 1:
            return [("error", None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")]
        parts = zip(images.split(1), labels.split(1), strict=True)
        return [result for image, label in parts for result in _run(stage, image, label, eps)]
    return [
        ("certified", None, "")
        if is_certified
        else ("falsified", adversarial[k], "")
        if k in adversarial
        else ("unknown", None, "")
        for k, is_certified in enumerate(certified.tolist())
    ]
