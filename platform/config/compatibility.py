"""Compatibility checks across sections: networks, objectives, certifiers and workers."""

from linflab.models.networks.base import StoredImagesConfig
from linflab.models.networks.ensemble import EnsembleConfig
from linflab.models.networks.sort_net import MASK_GROUP_SIZE
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.errors import InputError


def check_compatibility(experiment: ExperimentConfig) -> None:
    """Check that network, objective, evaluation, training and workers are compatible.

    Raises:
        InputError: If settings are incompatible; the message names these settings.
    """
    model, certifier = experiment.model, experiment.evaluation.certifier
    if not isinstance(model, EnsembleConfig):  # others are trained, so settings of training matter
        _check_training(experiment)
    try:
        model.check()
    except ValueError as error:
        raise InputError(str(error)) from None
    has_no_relaxation = model.is_lipschitz and not model.has_relu
    if (certifier == "lipschitz" and not model.is_lipschitz) or (
        certifier in ("crown", "alpha_crown") and has_no_relaxation
    ):
        lacks = "a Lipschitz constant" if certifier == "lipschitz" else "a ReLU or tanh to relax"
        raise InputError(
            f"evaluation.certifier={certifier}: requires {lacks}, but model.kind={model.kind} has none; "
            "use evaluation.certifier=ibp"
        )


def _check_training(experiment: ExperimentConfig) -> None:
    """Check that network, objective, training and workers are compatible.

    Raises:
        InputError: If settings are incompatible; the message names these settings.
    """
    model, objective, workers = experiment.model, experiment.objective, experiment.compute.workers
    kind = model.kind
    if experiment.training.batch_size % workers:
        raise InputError(
            f"training.batch_size={experiment.training.batch_size}: must be a multiple of "
            f"compute.workers={workers}; use a batch size that all workers share equally"
        )
    if objective.needs_lipschitz and not model.is_lipschitz:
        raise InputError(
            f"objective.kind={objective.kind}: requires a Lipschitz constant, but model.kind={kind} has none; use "
            "worst_case_cross_entropy or worst_case_hinge, or else cross_entropy or adversarial_cross_entropy"
        )
    if objective.needs_relu and not model.has_relu:
        raise InputError(
            f"objective.kind={objective.kind}: requires ReLUs, but model.kind={kind} has none; use "
            "worst_case_cross_entropy, or a network such as model.kind=conv_net"
        )
    bound = getattr(objective, "bound", "ibp")
    if bound != "ibp" and not model.has_relu:
        raise InputError(
            f"objective.bound={bound}: requires ReLUs, but model.kind={kind} has none; use objective.bound=ibp"
        )
    shrink = getattr(objective, "relu_shrink", 1.0)
    if shrink != 1 and not model.has_relu:
        raise InputError(f"objective.relu_shrink={shrink:g}: requires ReLUs, but model.kind={kind} has none; use 1")
    penalty = getattr(objective, "warmup_reg_weight", 0.0)
    if penalty and not model.has_relu:
        raise InputError(
            f"objective.warmup_reg_weight={penalty:g}: requires ReLUs, but model.kind={kind} has none; use 0"
        )
    if experiment.optimizer.lp_weight_decay and not model.has_distances:
        raise InputError(
            f"optimizer.lp_weight_decay={experiment.optimizer.lp_weight_decay:g}: requires distance layers, but "
            f"model.kind={kind} has none; use optimizer.weight_decay"
        )
    if experiment.compute.tensor_cores and (model.uses_input_masks or not model.has_distances):
        raise InputError(
            f"compute.tensor_cores=true: requires l_inf-distance layers without input masks, but model.kind={kind} has "
            "none; use false"
        )
    if getattr(model, "has_linear_batch_norm", False) and experiment.training.batch_size == 1:
        raise InputError(
            f"training.batch_size=1: must be at least 2, since linear layers of model.kind={kind} have batch "
            "normalization; use a larger batch"
        )
    if isinstance(model, StoredImagesConfig) and experiment.training.epochs != 1:
        raise InputError(
            f"training.epochs={experiment.training.epochs}: must be 1 for model.kind={kind}, which is not trained, but "
            "stores training images; use 1"
        )
    if model.uses_input_masks and MASK_GROUP_SIZE % workers:
        raise InputError(
            f"compute.workers={workers}: must divide {MASK_GROUP_SIZE}, the number of samples that share an input mask "
            "of SortNet; use 1, 2, 4, 8, 16 or 32"
        )
