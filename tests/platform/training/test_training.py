"""The training loop: learning, bitwise reproducibility, and errors."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from linflab.models.robustness.bounds.boxes import perturbation_box
from linflab.models.robustness.bounds.dual_bound import dual_bound
from linflab.models.robustness.bounds.ibp import logit_difference_ranges, propagate_bounds
from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.models.robustness.bounds.worst_case import WorstCaseBounds
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import load_dataset
from linflab.platform.errors import InputError, RunInterrupted, TrainingError
from linflab.platform.host import configure_process
from linflab.platform.training.checkpoints import CheckpointStore
from linflab.platform.training.evaluation import EvaluationSpec, evaluate, evaluation_spec
from linflab.platform.training.fit import fit
from linflab.platform.training.loop import EpochMetrics, StepMetrics
from linflab.platform.training.trainer import Trainer
from tests.conftest import QUICK, RECIPE, TrainedOnDigits

pytestmark = pytest.mark.integration

LIPSCHITZ = EvaluationSpec((0.1,), "lipschitz")


def test_training_learns_digits(digits_net: TrainedOnDigits) -> None:
    accuracy = evaluate(digits_net.trained.network, digits_net.dataset.test, LIPSCHITZ, 100)[0]
    assert accuracy.clean > 0.85 and accuracy.certified > 0.7  # 20 of the recipe's 50 epochs


@pytest.mark.parametrize("kind", ["clipped_hinge_cross_entropy", "hinge"])
def test_same_seed_gives_bitwise_equal_weights(kind: str) -> None:
    overrides = [*QUICK, f"objective.kind={kind}", "objective.theta=0.2"]
    nets = []
    for seed in (3, 3, 4):
        experiment = load_config(RECIPE, [*overrides, f"seed={seed}"])
        nets.append(fit(experiment, load_dataset("digits")).network.state_dict())
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])
    assert not all(torch.equal(nets[0][name], nets[2][name]) for name in nets[0])


def test_metrics_follow_the_schedules() -> None:
    epochs: list[EpochMetrics] = []
    steps: list[StepMetrics] = []
    overrides = ["training.epochs=4", "p_schedule.warmup_fraction=0.25", "p_schedule.inf_fraction=0.25"]
    experiment = load_config(RECIPE, overrides)
    trained = fit(experiment, load_dataset("digits"), epochs.append, steps.append)
    assert [step.step for step in steps] == list(range(1, 4 * 37 + 1))  # 1200 images in batches of 32
    assert {step.p for step in steps[:37]} == {8.0}
    assert {step.p for step in steps[-37:]} == {math.inf}
    assert [report.at.p for report in epochs] == [steps[37 * epoch - 1].p for epoch in (1, 2, 3, 4)]
    assert epochs[0].at.cross_entropy_weight == experiment.objective.lambda_start
    assert epochs[-1].at.cross_entropy_weight == pytest.approx(experiment.objective.lambda_end)
    assert epochs[-1].at.learning_rate < epochs[0].at.learning_rate
    # Of epochs with the best validation certified accuracy, the latest is selected.
    best = max(epochs, key=lambda report: (report.validation.certified, report.epoch))
    assert trained.epoch == best.epoch and trained.validation == best.validation
    assert evaluate(trained.network, load_dataset("digits").validation, LIPSCHITZ, 1000) == [best.validation]


RELU_NET = [
    "model.kind=cnn7",
    "model.width=4",
    "model.hidden_size=32",
    "model.ibp_initialization=true",
    "objective.eps_train=0.03",
    "eps_schedule.warmup_fraction=0.1",
    "eps_schedule.rampup_fraction=0.4",
    "optimizer.learning_rate=0.005",
    "optimizer.max_grad_norm=10",
]
KINDS = {
    "convolutional": ["model.kind=linf_dist_conv_net", "model.width=4", "model.hidden_size=16"],
    "SortNet": ["model.kind=sort_net", "model.width=32", "model.depth=3"],
    "hybrid": [
        "model.kind=linf_dist_hybrid",
        "model.backbone.kind=linf_dist_mlp",
        "model.backbone.width=32",
        "model.backbone.depth=3",
        "model.hidden_size=16",
        "objective.kind=worst_case_cross_entropy",
        "objective.eps_train=0.05",
        "eps_schedule.rampup_fraction=0.3",
    ],
    "SortNet hybrid": [
        "model.kind=linf_dist_hybrid",
        "model.backbone.kind=sort_net",
        "model.backbone.width=32",
        "model.backbone.depth=3",
        "model.hidden_size=16",
        "objective.kind=worst_case_hinge",
        "objective.eps_train=0.05",
        "eps_schedule.rampup_fraction=0.3",
        "eps_schedule.shape=smooth",
        "optimizer.weight_decay=0.02",
    ],
    "GroupSort": ["model.kind=group_sort", "model.width=64", "model.depth=3"],
    "adversarial": [*RELU_NET, "objective.kind=adversarial_cross_entropy", "objective.steps=3"],
    "COLT": [*RELU_NET, "objective.kind=colt", "objective.steps=2", "objective.projections=5"],
    "MTL-IBP": [*RELU_NET, "objective.kind=mtl_ibp", "objective.steps=1", "objective.restarts=2"],
    "IBP": [*RELU_NET, "objective.kind=worst_case_cross_entropy", "objective.warmup_reg_weight=0.5"],
    "CROWN-IBP": [*RELU_NET, "objective.kind=worst_case_cross_entropy", "objective.bound=crown_ibp_fused"],
    "PVT": [*RELU_NET, "objective.kind=pvt"],  # its objective has parameters that depend on the network
}


KINDS["SABR"] = [*KINDS["SortNet hybrid"], "objective.kind=sabr", "objective.steps=2"]
# Slow: CROWN-IBP covers IBP, and a test with two workers compares attack steps.
SLOW_KINDS = ("IBP", "adversarial", "COLT", "MTL-IBP", "PVT", "SABR")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW_KINDS else kind for kind in KINDS]
)
def test_every_kind_of_network_learns_deterministically(kind: str, tmp_path: Path) -> None:
    """Includes interrupted trainings: random draws of SortNet depend on the step, not on the process."""
    experiment = load_config(RECIPE, [*KINDS[kind], "training.epochs=8", "training.checkpoint_interval=3"])
    data = load_dataset("digits")
    trained = fit(experiment, data)
    assert trained.validation is not None and trained.validation.clean > 0.5
    spec = evaluation_spec(experiment, trained.network, with_attacks=False)
    assert spec.certifier == ("lipschitz" if kind in ("convolutional", "SortNet", "GroupSort") else "ibp")
    assert evaluate(trained.network, data.validation, spec, 100) == [trained.validation]

    checkpoints, steps = CheckpointStore(tmp_path / "run"), 0

    def on_step(report: StepMetrics) -> None:
        nonlocal steps
        steps = report.step

    with pytest.raises(RunInterrupted):
        fit(experiment, data, on_step=on_step, checkpoints=checkpoints, should_stop=lambda: steps >= 101)
    resumed = fit(experiment, data, checkpoints=checkpoints)
    assert (resumed.epoch, resumed.validation) == (trained.epoch, trained.validation)
    for name, tensor in trained.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name


@pytest.mark.slow
def test_verifier_of_a_training_is_tighter_than_known_multipliers() -> None:
    """Untrained, the verifier has the multipliers of Wong and Kolter. Images are those of the test set."""
    experiment, data = load_config("digits_eps0.1_pvt", ["training.epochs=12"]), load_dataset("digits")
    trainer = Trainer(experiment, data)
    network, trained = trainer.network, trainer.loss_module.objective
    for step in range(trainer.steps):
        if step % trainer.steps_per_epoch == 0:
            order = trainer.epoch_order(1 + step // trainer.steps_per_epoch)
        trainer.step(step, *order)
    untrained = experiment.objective.build(math.nan)
    untrained.prepare(network.eval(), data.info.input_shape)
    images, labels = data.test.batch(torch.arange(100))
    identity = torch.eye(10)
    with torch.no_grad():
        traced, values = WorstCaseBounds(network).trace_batch(images)
        boxes = propagate_bounds(traced, perturbation_box(images, 0.1))
        functions = identity - identity[labels][:, None]
        learned, known = (one.bound_functions(traced, values, boxes, functions).mean() for one in (trained, untrained))
        random = dual_bound(traced, boxes, functions, lambda step, a: a * torch.rand_like(a)).mean()
        center, spread = logit_difference_ranges(traced, boxes, labels)
    assert learned < known - 0.01 * known.abs() and learned < random
    assert learned < (center + spread).scatter(1, labels[:, None], 0.0).mean()  # IBP
    (scores,) = evaluate(network, data.test, evaluation_spec(experiment, network, with_attacks=False), 360)
    assert scores.clean > 0.8 and scores.certified > 0.4


def test_eps_follows_its_schedule() -> None:
    experiment = load_config(RECIPE, [*KINDS["hybrid"], "training.epochs=4", "eps_schedule.rampup_fraction=0.5"])
    epochs: list[EpochMetrics] = []
    fit(experiment, load_dataset("digits"), epochs.append)
    progress = [(37 * epoch - 1) / (4 * 37) for epoch in (1, 2, 3, 4)]
    assert [report.at.eps for report in epochs] == pytest.approx(
        [0.05 * min(1, fraction / 0.5) for fraction in progress]
    )


def test_include_validation_trains_on_validation_images() -> None:
    experiment = load_config(RECIPE, [*QUICK, "training.include_validation=true"])
    data, epochs, steps = load_dataset("digits"), [], []
    trained = fit(experiment, data, epochs.append, steps.append)
    assert steps[-1].steps == 3 * ((1200 + 237) // 32)
    assert trained.validation is None and trained.epoch == 3
    assert all(report.validation is None and report.best_certified is None for report in epochs)
    selected = fit(load_config(RECIPE, QUICK), data)
    names = selected.network.state_dict()
    assert not all(torch.equal(trained.network.state_dict()[name], names[name]) for name in names)


def test_validation_interval_changes_the_selection_only() -> None:
    """Training is the same as with a validation after each epoch; the last epoch is always validated."""
    data = load_dataset("digits")
    reports: dict[int, list[EpochMetrics]] = {1: [], 2: []}
    trained = {
        interval: fit(
            load_config(RECIPE, [*QUICK, f"training.validation_interval={interval}"]), data, reports[interval].append
        )
        for interval in reports
    }
    every, other = reports[1], reports[2]
    assert [report.epoch for report in other if report.validation is not None] == [2, 3]
    assert [report.train_loss for report in other] == [report.train_loss for report in every]
    assert [report.validation for report in other[1:]] == [report.validation for report in every[1:]]
    assert other[0].best_certified is None
    best = max(report.validation.certified for report in other if report.validation is not None)
    assert other[2].best_certified == best and trained[2].epoch in (2, 3)
    assert trained[2].validation is not None and trained[2].validation.certified == best


@pytest.mark.parametrize(("settings", "step"), [(["optimizer.learning_rate=1e30"], r"\d+"), ([], "40")])
def test_non_finite_loss_is_reported_with_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], step: str
) -> None:
    """The learning rate is far too large, or one step of the second epoch fails; earlier checkpoints are kept."""
    experiment = load_config(RECIPE, [*QUICK, "training.checkpoint_interval=1", *settings])
    checkpoints, original_step = CheckpointStore(tmp_path / "run"), Trainer.step

    def broken_step(self: Trainer, number: int, *shuffled: torch.Tensor) -> torch.Tensor:
        loss = original_step(self, number, *shuffled)
        return loss * math.nan if number == 39 else loss

    monkeypatch.setattr(Trainer, "step", broken_step)
    with pytest.raises(TrainingError, match=rf"\b{step}\b.*111\b.*optimizer\.learning_rate"):
        fit(experiment, load_dataset("digits"), checkpoints=checkpoints)
    if settings:
        assert not checkpoints.exist()
        return
    assert checkpoints.load()["epoch"] == 2
    monkeypatch.setattr(Trainer, "step", original_step)
    resumed = fit(experiment, load_dataset("digits"), checkpoints=checkpoints).network.state_dict()
    undisturbed = fit(experiment, load_dataset("digits")).network.state_dict()
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in resumed)


def test_non_finite_weights_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load_config(RECIPE, [*QUICK, "training.checkpoint_interval=1"])
    checkpoints, original_step = CheckpointStore(tmp_path / "run"), Trainer.step

    def broken_step(self: Trainer, number: int, *shuffled: torch.Tensor) -> torch.Tensor:
        loss = original_step(self, number, *shuffled)
        if number == 36:  # the last step of the first epoch; its loss is finite
            with torch.no_grad():
                self.network.bias[0] = math.nan
        return loss

    monkeypatch.setattr(Trainer, "step", broken_step)
    with pytest.raises(TrainingError, match=r"\b37\b.*\b111\b"):
        fit(experiment, load_dataset("digits"), checkpoints=checkpoints)
    assert not checkpoints.exist()


@pytest.mark.parametrize("algorithm", ["adamw", "sgd"])
def test_frozen_layers_stay_the_same_with_momentum_and_penalties(algorithm: str) -> None:
    settings = [f"optimizer.algorithm={algorithm}", "optimizer.weight_decay=0.1", "optimizer.l1_weight=0.01"]
    settings += ["eps_schedule.warmup_fraction=0", "training.epochs=3"]
    trainer = Trainer(load_config(RECIPE, [*KINDS["COLT"], *settings]), load_dataset("digits"))
    order, last_stage = trainer.epoch_order(1), 2 * trainer.steps_per_epoch + 5
    trainer.step(0, *order)  # all layers have momentum
    before = copy.deepcopy(trainer.network.state_dict())
    trainer.step(last_stage, *order)
    changed = {name for name, value in trainer.network.state_dict().items() if not torch.equal(value, before[name])}
    frozen = trainer.loss_module.objective.frozen_layers(trainer.scheduled_values(last_stage).progress)
    names = {name for name, module in trainer.network.named_modules() if module in frozen}
    assert len(names) == 7  # normalization, and two convolutions with batch normalization and ReLU
    assert {name.rpartition(".")[0] for name in changed}.isdisjoint(names)
    trained = {name for name, _ in trainer.network.named_parameters() if name.rpartition(".")[0] not in names}
    assert trained <= changed


def test_workers_share_the_random_draws_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is the mean of the draws of a worker's samples."""
    experiment, data, losses = load_config(RECIPE, KINDS["IBP"]), load_dataset("digits"), []
    for rank, workers in ((0, 1), (0, 2), (1, 2)):
        trainer = Trainer(experiment, data, rank, workers)
        zero = 0 * next(trainer.network.parameters()).sum()
        monkeypatch.setattr(
            trainer.loss_module.objective, "loss", lambda _, batch, zero=zero: zero + batch.draw_uniform((3,)).mean()
        )
        losses.append(trainer.step(7, *trainer.epoch_order(1)).item())
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2) and losses[1] != losses[2]


TWO_WORKER_KINDS = ("mlp", "SortNet", "SortNet hybrid", "CROWN-IBP", "COLT", "PVT")


def load_two_worker_config(kind: str) -> ExperimentConfig:
    settings = ["augmentation.padding=1", "augmentation.horizontal_flip=true", "augmentation.gamma_range=0.2"]
    settings += [] if kind in ("CROWN-IBP", "COLT", "PVT") else ["optimizer.lp_weight_decay=0.005"]
    settings += ["model.mean_over=kept"] if kind == "SortNet" else []
    return load_config(RECIPE, [*KINDS.get(kind, []), *settings, "training.epochs=2"])


@pytest.fixture(scope="module")
def two_worker_losses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the step losses of each kind, trained one after another by two processes."""
    folder = tmp_path_factory.mktemp("workers")
    for kind in TWO_WORKER_KINDS:
        (folder / f"{kind}.yaml").write_text(load_two_worker_config(kind).to_yaml())
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(folder)]) for rank in (0, 1)]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", TWO_WORKER_KINDS)
def test_two_workers_match_the_losses_of_one(kind: str, two_worker_losses: Path) -> None:
    """Compare 50 steps at the same global batch, with crops, mean shift and decay: within 1e-4, relative.

    COLT's attacks use signs of gradients, which rounding can flip. Its three stages freeze different layers. PVT's
    multipliers depend on signs too.
    """
    experiment, losses = load_two_worker_config(kind), []
    data = load_dataset("digits", experiment.augmentation)
    with pytest.raises(RunInterrupted):
        fit(experiment, data, on_step=lambda r: losses.append(r.loss.item()), should_stop=lambda: len(losses) >= 50)
    by_worker = [torch.load(two_worker_losses / f"{kind}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    mean = (by_worker[0] + by_worker[1]) / 2
    torch.testing.assert_close(
        mean[:50], torch.tensor(losses[:50]), rtol={"COLT": 0.02, "PVT": 2e-3}.get(kind, 1e-4), atol=0
    )
    assert not torch.equal(by_worker[0], by_worker[1])  # each worker has its own samples


@pytest.mark.parametrize(
    ("kind", "settings", "decays"),
    [
        ("mlp", ["optimizer.lp_weight_decay=0.5"], {"network.bias": 0.5, "objective.scale": 0}),
        ("mlp", ["optimizer.weight_decay=0.5"], {"network.bias": 0, "objective.scale": 0.5}),
        ("SortNet", ["optimizer.weight_decay=0.5"], {"network.bias": 0, "objective.scale": 0.5}),
        ("hybrid", ["optimizer.weight_decay=0.5"], {"network.head.0.bias": 0.5, "network.head.2.weight": 0.5}),
        ("hybrid", ["optimizer.lp_weight_decay=0.5"], {"network.head.0.bias": 0, "network.head.2.weight": 0}),
    ],
)
def test_biases_of_distance_layers_decay_with_their_layers(
    kind: str, settings: list[str], decays: dict[str, float]
) -> None:
    """AdamW decays no distance weights, which have l_p decay."""
    trainer = Trainer(load_config(RECIPE, [*KINDS.get(kind, []), *settings]), load_dataset("digits"))
    decay_by_id = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    by_name = {name: decay_by_id.pop(id(parameter)) for name, parameter in trainer.loss_module.named_parameters()}
    assert not decay_by_id
    assert {name: by_name[name] for name in decays} == decays
    assert not any(decay for name, decay in by_name.items() if "distances" in name or "last" in name)


@pytest.mark.parametrize("kind", ["adversarial", "MTL-IBP"])
def test_attacks_of_two_workers_start_like_those_of_one(kind: str) -> None:
    """Later steps use signs of gradients, which rounding can flip; tests of other objectives cover the rest."""
    experiment = load_config(RECIPE, [*KINDS[kind], "eps_schedule.warmup_fraction=0"])
    starts = []
    for rank, workers in ((0, 1), (0, 2), (1, 2)):
        trainer = Trainer(experiment, load_dataset("digits"), rank, workers)
        seen: list[torch.Tensor] = []

        def loss(*arguments: object, trainer: Trainer = trainer, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(arguments[-1])
            return trainer.loss_module(*arguments)

        trainer.parallel = loss
        trainer.step(0, *trainer.epoch_order(1))  # eps = 0: no attack
        trainer.step(5, *trainer.epoch_order(1))
        assert seen[0] is None
        starts.append(seen[1])
    torch.testing.assert_close(starts[0][0::2], starts[1], rtol=0, atol=0)
    torch.testing.assert_close(starts[0][1::2], starts[2], rtol=0, atol=0)


WORKER = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import load_dataset
from linflab.platform.training.fit import fit
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
for file in sorted(folder.glob("*.yaml")):
    experiment, losses = load_config(str(file)), []
    fit(experiment, load_dataset("digits", experiment.augmentation), on_step=lambda report: losses.append(report.loss))
    torch.save(torch.stack(losses), folder / f"{file.stem}-{rank}.pt")
dist.destroy_process_group()
"""


def test_convolution_precision_is_valid_for_old_queries() -> None:
    """PyTorch rejects some mixtures of precision settings: its export reads old names, linflab sets new ones."""
    configure_process()
    with torch.backends.cudnn.flags(enabled=True), strict_float32():
        pass
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.deterministic and torch.backends.cudnn.conv.fp32_precision in ("none", "ieee")


def test_images_too_small_for_a_network_are_rejected() -> None:
    settings = ["model.kind=conv_net", "model.size=medium", "objective.kind=cross_entropy"]
    with pytest.raises(InputError, match=r"model\.size=medium\b.*\(1, 8, 8\)"):
        fit(load_config(RECIPE, settings), load_dataset("digits"))


def test_batch_larger_than_the_dataset_is_rejected() -> None:
    with pytest.raises(InputError, match=r"training\.batch_size=2000.*1200"):
        fit(load_config(RECIPE, ["training.batch_size=2000"]), load_dataset("digits"))


@pytest.mark.parametrize("settings", [["training.batch_size=1000"], ["training.epochs=2"]])
@pytest.mark.parametrize("rate", ["1e30", "1e10"])
def test_training_fails_when_weights_exceed_float32_resolution(settings: list[str], rate: str) -> None:
    """Every loss is finite, but the network predicts one class for all images, each with a certificate."""
    experiment = load_config(RECIPE, ["training.epochs=1", f"optimizer.learning_rate={rate}", *settings])
    with pytest.raises(TrainingError, match=r"optimizer\.learning_rate"):
        fit(experiment, load_dataset("digits"))
