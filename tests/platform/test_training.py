"""The training loop: what it learns, that it repeats bit for bit, and how it stops when something is wrong."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from linflab.models.robustness.bounds.rounding import exact_products
from linflab.platform.checkpoints import Checkpoints
from linflab.platform.config import load_experiment
from linflab.platform.datasets import load_dataset
from linflab.platform.errors import Interrupted, SettingError, TrainingError
from linflab.platform.evaluation import Scoring, evaluate, scoring_of
from linflab.platform.process import settle_process
from linflab.platform.training import EpochReport, StepReport, Trainer, fit
from tests.conftest import QUICK, RECIPE, TrainedOnDigits

LIPSCHITZ = Scoring((0.1,), "lipschitz")


def test_learns_digits(digits_net: TrainedOnDigits) -> None:
    accuracy = evaluate(digits_net.trained.network, digits_net.dataset.test, LIPSCHITZ, 100)[0]
    assert accuracy.clean > 0.85 and accuracy.certified > 0.7  # 20 of the recipe's 50 epochs


@pytest.mark.parametrize("kind", ["clipped_hinge_cross_entropy", "hinge"])
def test_same_seed_same_bits(kind: str) -> None:
    overrides = [*QUICK, f"objective.kind={kind}", "objective.theta=0.2"]
    nets = []
    for seed in (3, 3, 4):
        experiment = load_experiment(RECIPE, [*overrides, f"seed={seed}"])
        nets.append(fit(experiment, load_dataset("digits")).network.state_dict())
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])
    assert not all(torch.equal(nets[0][name], nets[2][name]) for name in nets[0])


def test_reports_follow_the_schedules() -> None:
    epochs: list[EpochReport] = []
    steps: list[StepReport] = []
    overrides = ["training.epochs=4", "p_schedule.warmup_share=0.25", "p_schedule.infinity_share=0.25"]
    experiment = load_experiment(RECIPE, overrides)
    trained = fit(experiment, load_dataset("digits"), epochs.append, steps.append)
    assert [step.step for step in steps] == list(range(1, 4 * 37 + 1))  # 1200 images in batches of 32
    assert {step.p for step in steps[:37]} == {8.0}
    assert {step.p for step in steps[-37:]} == {math.inf}
    assert [report.at.p for report in epochs] == [steps[37 * epoch - 1].p for epoch in (1, 2, 3, 4)]
    assert epochs[0].at.cross_entropy_weight == experiment.objective.lambda_start
    assert epochs[-1].at.cross_entropy_weight == pytest.approx(experiment.objective.lambda_end)
    assert epochs[-1].at.learning_rate < epochs[0].at.learning_rate
    # the network kept is the latest of those that certify most validation images
    best = max(epochs, key=lambda report: (report.validation.certified, report.epoch))
    assert trained.epoch == best.epoch and trained.validation == best.validation
    assert evaluate(trained.network, load_dataset("digits").validation, LIPSCHITZ, 1000) == [best.validation]


RELU_NET = [
    "model.kind=cnn7",
    "model.width=4",
    "model.hidden=32",
    "model.interval_initialization=true",
    "objective.eps_train=0.03",
    "eps_ramp.warmup_share=0.1",
    "eps_ramp.share=0.4",
    "optimizer.learning_rate=0.005",
    "optimizer.largest_gradient=10",
]
KINDS = {
    "convolutional": ["model.kind=linf_dist_conv_net", "model.width=4", "model.dense_width=16"],
    "SortNet": ["model.kind=sort_net", "model.width=32", "model.depth=3"],
    "hybrid": [
        "model.kind=linf_dist_hybrid",
        "model.net.kind=linf_dist_mlp",
        "model.net.width=32",
        "model.net.depth=3",
        "model.hidden=16",
        "objective.kind=worst_case_cross_entropy",
        "objective.eps_train=0.05",
        "eps_ramp.share=0.3",
    ],
    "SortNet hybrid": [
        "model.kind=linf_dist_hybrid",
        "model.net.kind=sort_net",
        "model.net.width=32",
        "model.net.depth=3",
        "model.hidden=16",
        "objective.kind=worst_case_hinge",
        "objective.eps_train=0.05",
        "eps_ramp.share=0.3",
        "eps_ramp.shape=smooth",
        "optimizer.weight_decay=0.02",
    ],
    "GroupSort": ["model.kind=group_sort", "model.width=64", "model.depth=3"],
    "adversarial": [*RELU_NET, "objective.kind=adversarial_cross_entropy", "objective.steps=3"],
    "IBP": [*RELU_NET, "objective.kind=worst_case_cross_entropy", "objective.penalty=0.5"],
    "CROWN-IBP": [*RELU_NET, "objective.kind=worst_case_cross_entropy", "objective.bound=crown_ibp_fused"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_learns_and_repeats_its_bits(kind: str, tmp_path: Path) -> None:
    """Also where the training is cut and goes on: what chance decides in SortNet is of the step, not of the process."""
    experiment = load_experiment(RECIPE, [*KINDS[kind], "training.epochs=8", "training.checkpoint_epochs=3"])
    data = load_dataset("digits")
    trained = fit(experiment, data)
    assert trained.validation is not None and trained.validation.clean > 0.5
    scoring = scoring_of(experiment, trained.network, attacked=False)
    assert scoring.certifier == ("lipschitz" if kind in ("convolutional", "SortNet", "GroupSort") else "interval")
    assert evaluate(trained.network, data.validation, scoring, 100) == [trained.validation]

    checkpoints, steps = Checkpoints(tmp_path / "run"), 0

    def on_step(report: StepReport) -> None:
        nonlocal steps
        steps = report.step

    with pytest.raises(Interrupted):
        fit(experiment, data, on_step=on_step, checkpoints=checkpoints, should_stop=lambda: steps >= 101)
    again = fit(experiment, data, checkpoints=checkpoints)
    assert (again.epoch, again.validation) == (trained.epoch, trained.validation)
    for name, tensor in trained.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name]), name


def test_eps_follows_its_ramp() -> None:
    experiment = load_experiment(RECIPE, [*KINDS["hybrid"], "training.epochs=4", "eps_ramp.share=0.5"])
    epochs: list[EpochReport] = []
    fit(experiment, load_dataset("digits"), epochs.append)
    progress = [(37 * epoch - 1) / (4 * 37) for epoch in (1, 2, 3, 4)]
    assert [report.at.eps for report in epochs] == pytest.approx([0.05 * min(1, share / 0.5) for share in progress])


def test_final_mode_trains_on_validation_images_too() -> None:
    experiment = load_experiment(RECIPE, [*QUICK, "training.include_validation=true"])
    data, epochs, steps = load_dataset("digits"), [], []
    trained = fit(experiment, data, epochs.append, steps.append)
    assert steps[-1].steps == 3 * ((1200 + 237) // 32)
    assert trained.validation is None and trained.epoch == 3
    assert all(report.validation is None and report.best_certified is None for report in epochs)
    selected = fit(load_experiment(RECIPE, QUICK), data)
    names = selected.network.state_dict()
    assert not all(torch.equal(trained.network.state_dict()[name], names[name]) for name in names)


@pytest.mark.parametrize(("settings", "step"), [(["optimizer.learning_rate=1e30"], r"\d+"), ([], "40")])
def test_a_loss_that_is_not_finite_is_named_by_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], step: str
) -> None:
    """By a rate that is far too large; or at one step in the second epoch. What was saved before is kept."""
    experiment = load_experiment(RECIPE, [*QUICK, "training.checkpoint_epochs=1", *settings])
    checkpoints, whole = Checkpoints(tmp_path / "run"), Trainer.step

    def broken(self: Trainer, number: int, *shuffled: torch.Tensor) -> torch.Tensor:
        loss = whole(self, number, *shuffled)
        return loss * math.nan if number == 39 else loss

    monkeypatch.setattr(Trainer, "step", broken)
    with pytest.raises(TrainingError, match=rf"at step {step} of 111, in epoch [12] of 3.*learning_rate"):
        fit(experiment, load_dataset("digits"), checkpoints=checkpoints)
    if settings:
        assert not checkpoints.exist()
        return
    assert checkpoints.load()["epoch"] == 2
    monkeypatch.setattr(Trainer, "step", whole)
    resumed = fit(experiment, load_dataset("digits"), checkpoints=checkpoints).network.state_dict()
    undisturbed = fit(experiment, load_dataset("digits")).network.state_dict()
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in resumed)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load_experiment(RECIPE, [*QUICK, "training.checkpoint_epochs=1"])
    checkpoints, whole = Checkpoints(tmp_path / "run"), Trainer.step

    def broken(self: Trainer, number: int, *shuffled: torch.Tensor) -> torch.Tensor:
        loss = whole(self, number, *shuffled)
        if number == 36:  # the last of the first epoch: its loss was fine
            with torch.no_grad():
                self.network.bias[0] = math.nan
        return loss

    monkeypatch.setattr(Trainer, "step", broken)
    with pytest.raises(TrainingError, match=r"weight became infinite or NaN at step 37 of 111"):
        fit(experiment, load_dataset("digits"), checkpoints=checkpoints)
    assert not checkpoints.exist()


@pytest.mark.parametrize("kind", ["mlp", "SortNet hybrid", "CROWN-IBP"])
def test_two_workers_have_the_losses_of_one(kind: str, tmp_path: Path) -> None:
    """Over the first 50 steps at the same global batch, with crops, mean shift and decay: within 1e-4, relatively."""
    settings = ["augmentation.padding=1", "augmentation.flip=true"]
    settings += [] if kind == "CROWN-IBP" else ["optimizer.lp_weight_decay=0.005"]
    experiment = load_experiment(RECIPE, [*KINDS.get(kind, []), *settings, "training.epochs=2"])
    losses: list[float] = []
    fit(experiment, load_dataset("digits", experiment.augmentation), on_step=lambda r: losses.append(r.loss.item()))
    (tmp_path / "experiment.yaml").write_text(experiment.to_yaml())
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    together = (parts[0] + parts[1]) / 2
    torch.testing.assert_close(together[:50], torch.tensor(losses[:50]), rtol=1e-4, atol=0)
    assert not torch.equal(parts[0], parts[1])  # each its own samples


def test_attacks_of_two_workers_start_where_those_of_one_do() -> None:
    """Further steps are by signs of gradients, which roundings turn: that all else is equal, other objectives show."""
    experiment = load_experiment(RECIPE, [*KINDS["adversarial"], "eps_ramp.warmup_share=0"])
    found = []
    for rank, workers in ((0, 1), (0, 2), (1, 2)):
        trainer = Trainer(experiment, load_dataset("digits"), rank, workers)
        seen: list[torch.Tensor] = []

        def loss(*arguments: object, trainer: Trainer = trainer, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(arguments[-1])
            return trainer.loss_of(*arguments)

        trainer.parallel = loss
        trainer.step(0, *trainer.shuffle(1))  # at eps = 0 there is nothing to look for
        trainer.step(5, *trainer.shuffle(1))
        assert seen[0] is None
        found.append(seen[1])
    torch.testing.assert_close(found[0][0::2], found[1], rtol=0, atol=0)
    torch.testing.assert_close(found[0][1::2], found[2], rtol=0, atol=0)


WORKER = """
import sys, torch, torch.distributed as dist
from linflab.platform.config import load_experiment
from linflab.platform.datasets import load_dataset
from linflab.platform.training import fit
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
experiment, losses = load_experiment(f"{folder}/experiment.yaml"), []
fit(experiment, load_dataset("digits", experiment.augmentation), on_step=lambda report: losses.append(report.loss))
torch.save(torch.stack(losses), f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_convolutions_are_settled_for_those_who_ask() -> None:
    """PyTorch refuses some mixtures of its settings of precision: its export asks by the old names, we by the new."""
    settle_process()
    with torch.backends.cudnn.flags(enabled=True), exact_products():
        pass
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.deterministic and torch.backends.cudnn.conv.fp32_precision in ("none", "ieee")


def test_images_too_small_for_a_network() -> None:
    settings = ["model.kind=conv_net", "model.size=medium", "objective.kind=cross_entropy"]
    with pytest.raises(SettingError, match=r"model\.size=medium: images of shape \(1, 8, 8\) are too small"):
        fit(load_experiment(RECIPE, settings), load_dataset("digits"))


def test_batch_larger_than_the_data() -> None:
    with pytest.raises(SettingError, match=r"training\.batch_size=2000.*1200"):
        fit(load_experiment(RECIPE, ["training.batch_size=2000"]), load_dataset("digits"))
