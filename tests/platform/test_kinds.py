"""Your own networks, objectives, attacks and certifiers, selected by `kind` like the built-in ones."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

import linflab
from linflab.models.networks import LinfDistMLPConfig, NetworkConfig
from linflab.models.robustness.attacks import Attack, AttackConfig, LinfBall
from linflab.models.robustness.bounds.boxes import Box
from linflab.models.robustness.bounds.ibp import ibp_bounds
from linflab.models.robustness.certification import BoxCertifier, Certifier, certify
from linflab.models.robustness.margins import margin
from linflab.models.robustness.objectives import Batch, Objective, ObjectiveConfig
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import load_dataset
from linflab.platform.errors import InputError
from linflab.platform.training.trainer import Trainer, check_dataset_compatibility

RECIPE = "digits_eps0.1_ibp"


@pytest.fixture
def own_kinds() -> Iterator[None]:
    """Register a network, an objective, an attack and a certifier for one test."""

    class OwnNetworkConfig(NetworkConfig):
        has_relu: ClassVar[bool] = True

        kind: Literal["own_network"] = Field("own_network", description="your own network")
        width: int = Field(7, ge=1, description="hidden units")

        def build(
            self, input_shape: Sequence[int], classes: int, mean: Sequence[float] = (0.0,), std: float = 1.0
        ) -> nn.Module:
            inputs = torch.Size(input_shape).numel()
            hidden = nn.Linear(inputs, self.width)
            return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(self.width, classes))

    class OwnObjectiveConfig(ObjectiveConfig):
        kind: Literal["own_objective"] = Field("own_objective", description="your own objective")

        def build(self, lipschitz_constant: float) -> Objective:
            return OwnObjective()

    class OwnObjective(Objective):
        def loss(self, network: nn.Module, batch: Batch) -> Tensor:
            return functional.cross_entropy(network(1 - batch.images), batch.labels)

    class OwnAttack(Attack):
        kind: ClassVar[str] = "own_attack"

        def run(
            self,
            network: nn.Module,
            ball: LinfBall,
            labels: Tensor,
            eps: float,
            generator: torch.Generator,
            number: int,
        ) -> Tensor:
            with torch.no_grad():
                return ~(margin(network(ball.lower), labels) > 0) | ~(margin(network(ball.upper), labels) > 0)

    class OwnCertifier(BoxCertifier):
        kind: ClassVar[str] = "own_certifier"

        def verify(self, box: Box, labels: Tensor) -> Tensor:
            lower, upper = ibp_bounds(self.network, box, self.sound)
            least = lower.gather(1, labels[:, None])
            return (upper.scatter(1, labels[:, None], -torch.inf) < least).all(dim=1)

    yield
    for base, kind in (NetworkConfig, "own_network"), (ObjectiveConfig, "own_objective"):
        del base.registry[kind]
    del Attack.registry["own_attack"], Certifier.registry["own_certifier"]


@pytest.mark.usefixtures("own_kinds")
def test_own_kinds_are_trained_attacked_and_certified(tmp_path: Path) -> None:
    settings = ["model.kind=own_network", "model.width=5", "objective.kind=own_objective", "training.epochs=1"]
    settings += ["evaluation.attack.methods=[pgd,own_attack]", "evaluation.certifier=own_certifier", "eps=0.01"]
    experiment = load_config(RECIPE, settings)
    assert (experiment.model.kind, experiment.objective.kind) == ("own_network", "own_objective")
    assert ExperimentConfig.model_validate(experiment.model_dump()) == experiment
    assert ExperimentConfig.model_validate_json(experiment.model_dump_json()) == experiment
    result = linflab.train(RECIPE, settings, storage=tmp_path)
    assert result.network[1].out_features == 5 and result.certificate == "own_certifier-sound"
    images, _ = load_dataset("digits").test.batch(torch.arange(100))
    labels = result.network(images).argmax(dim=1)
    at_eps = linflab.certify(result.network, images, labels, eps=0.001, certifier="own_certifier")
    radii = linflab.certify(result.network, images, labels, certifier="own_certifier").radius
    assert at_eps.certified.any() and torch.equal(at_eps.certified, radii > 0.001)
    assert (at_eps.certified <= certify(result.network, images, labels, 0.001, "ibp")).all()
    attack_result = linflab.attack(result.network, images, labels, eps=0.2, attacks="own_attack")
    assert attack_result.attacks == ("own_attack",) and attack_result.robust.sum() < attack_result.clean.sum()
    assert AttackConfig(methods=("own_attack",), steps=3).describe() == "own_attack (3 steps, 1 restart)"


@pytest.mark.usefixtures("own_kinds")
def test_own_kinds_are_checked_and_listed() -> None:
    own = "model.kind=own_network"
    load_config(RECIPE, [own, "objective.bound=dual"])  # valid, since it has ReLUs
    for settings, message in (
        ([own, "model.width=0"], r"^model\.width=0\b"),
        ([own, "model.widht=3"], "did you mean width"),
        ([own, "objective.kind=hinge", "objective.theta=0.1"], r"objective.kind=hinge: .*model.kind=own_network"),
        ([own, "optimizer.lp_weight_decay=0.1"], r"optimizer.lp_weight_decay=0.1: .*own_network"),
        (["model.kind=other"], "model.kind=other: .*cnn7.*own_network"),
        (["objective.kind=other"], "objective.kind=other: .*hinge.*own_objective"),
        (["evaluation.attack.methods=[other]"], r"evaluation.attack.methods.0=other: .*'pgd', .* or 'own_attack'"),
        (["evaluation.certifier=other"], r"evaluation.certifier=other: .*'complete', 'own_certifier' or 'auto'"),
    ):
        with pytest.raises(InputError, match=message):
            load_config(RECIPE, settings)
    schema = ExperimentConfig.model_json_schema()["properties"]
    assert "own_network" in schema["model"]["discriminator"]["mapping"]
    assert "own_objective" in schema["objective"]["discriminator"]["mapping"]
    definitions = ExperimentConfig.model_json_schema()["$defs"]
    assert "own_certifier" in definitions["EvaluationConfig"]["properties"]["certifier"]["enum"]
    kinds, _ = definitions["AttackConfig"]["properties"]["methods"]["anyOf"]
    assert "own_attack" in kinds["items"]["enum"]


class OwnScale(nn.Module):
    """A module whose forward pass needs the value of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * float(self.scale)


@pytest.mark.usefixtures("own_kinds")
@pytest.mark.parametrize("kind", ["taps", "staps", "colt", "pvt", "sabr", "mtl_ibp"])
def test_layers_of_own_networks_are_checked_before_training(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that need values of parameters are checked when the Trainer has created these."""
    settings = ["model.kind=own_network", f"objective.kind={kind}", "training.batch_size=4"]
    settings += ["objective.stages=1"] if kind == "colt" else []
    experiment, data = load_config(RECIPE, settings), load_dataset("digits")

    def use_network(*layers: nn.Module) -> None:
        hidden = nn.Sequential(nn.Flatten(), nn.Linear(64, 8, device="cpu"), nn.ReLU())
        network = nn.Sequential(*hidden, *layers, nn.Linear(8, 10))
        parts = network, copy.deepcopy(network).to("meta")
        monkeypatch.setattr(
            type(experiment.model),
            "build",
            lambda *_: parts[torch.get_default_device().type == "meta"],
        )

    use_network(OwnScale())
    trainer = Trainer(experiment, data)
    assert trainer.step(trainer.steps - 1, *trainer.epoch_order(1)).isfinite()
    use_network(nn.Softmax(dim=1))
    with pytest.raises(InputError, match=r"^model\.kind=own_network: .*Softmax"):
        check_dataset_compatibility(experiment, data)
    use_network(OwnScale(), nn.Softmax(dim=1))
    check_dataset_compatibility(experiment, data)
    with pytest.raises(InputError, match=r"^model\.kind=own_network: .*Softmax"):
        Trainer(experiment, data)
    use_network(OwnScale(), nn.Linear(7, 8))
    with pytest.raises(InputError, match=r"^model\.kind=own_network: .*\b8\b"):
        Trainer(experiment, data)


def test_networks_that_an_objective_does_not_support_are_named() -> None:
    data = load_dataset("digits")
    for settings, message in (
        (["model.kind=wide_resnet", "objective.kind=pvt"], r"^model\.kind=wide_resnet: .*objective\.kind=pvt"),
        (["model.kind=conv_net", "objective.kind=colt", "objective.stages=9"], r"^objective\.stages=9\b"),
    ):
        with pytest.raises(InputError, match=message):
            check_dataset_compatibility(load_config(RECIPE, settings), data)


@pytest.mark.usefixtures("own_kinds")
def test_kind_belongs_to_one_class() -> None:
    with pytest.raises(TypeError, match=r"kind=cnn7: already used by .*CNN7Config; use another name"):

        class AnotherConfig(NetworkConfig):
            kind: Literal["cnn7"] = "cnn7"

    with pytest.raises(TypeError, match=r"kind=pgd: already used by .*PGD; use another name"):

        class AnotherAttack(Attack):
            kind: ClassVar[str] = "pgd"

    class NarrowConfig(LinfDistMLPConfig):
        width: int = 3

    assert NetworkConfig.kinds()["linf_dist_mlp"] is LinfDistMLPConfig  # a subclass without its own kind
    assert "cnn7" not in LinfDistMLPConfig.kinds()
    assert list(LinfDistMLPConfig.kinds()) == ["linf_dist_mlp", "sort_net"]
