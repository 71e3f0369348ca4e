"""Experiment: every setting of a run, validated, read from YAML and dotted overrides.

A recipe is a YAML file in `recipes/`, named by its stem, or any other YAML file, named by its path. Overrides like
`model.width=128` replace single settings. Whatever is wrong is refused here, with one line that names the setting.
"""

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from linflab.models.networks.convnets import (
    CNN7Config,
    ConvNetConfig,
    DenseNetConfig,
    ResNeXtConfig,
    WideResNetConfig,
)
from linflab.models.networks.group_sort import GroupSortConfig
from linflab.models.networks.hybrid import LinfDistHybridConfig
from linflab.models.networks.linf_dist import LinfDistConvNetConfig, LinfDistMLPConfig
from linflab.models.networks.sort_net import GROUP, SortNetConfig
from linflab.models.robustness.attacks.suite import AttackConfig
from linflab.models.robustness.certification import Certifier
from linflab.models.robustness.objectives import ObjectiveConfig
from linflab.platform.augmentation import AugmentationConfig
from linflab.platform.errors import SettingError
from linflab.platform.schedules import EpsRamp, PSchedule, Share

RECIPES = Path(__file__).parent / "recipes"

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]
ModelConfig = Annotated[
    LinfDistMLPConfig
    | LinfDistConvNetConfig
    | SortNetConfig
    | LinfDistHybridConfig
    | GroupSortConfig
    | ConvNetConfig
    | CNN7Config
    | ResNeXtConfig
    | DenseNetConfig
    | WideResNetConfig,
    Field(discriminator="kind"),
]
DISTANCE_NETS = ("linf_dist_mlp", "linf_dist_conv_net", "sort_net", "linf_dist_hybrid")
WITHOUT_RELU = (*DISTANCE_NETS, "group_sort")
LIPSCHITZ_NETS = ("linf_dist_mlp", "linf_dist_conv_net", "sort_net", "group_sort")


class Settings(BaseModel):
    """A section of the experiment: unknown settings are refused, values don't change."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class OptimizerConfig(Settings):
    """AdamW, with a learning rate that is constant at first and then follows half a cosine to zero."""

    learning_rate: Rate = 0.03
    hold_share: Share = Field(0.0, description="share of the training at the constant learning rate")
    objective_rate_ratio: Rate = Field(0.2, description="learning rate of the objective's parameters over that above")
    lp_weight_decay: Decay = Field(
        0.0, description="l_p weight decay of the distance layers; of a step it is the learning rate's part"
    )
    weight_decay: Decay = Field(
        0.0, description="decoupled weight decay of all other parameters; of a step it is the learning rate's part"
    )
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    epsilon: Rate = 1e-10
    largest_gradient: Rate | None = Field(
        None, description="gradients whose l_2 norm, over all parameters, is above this are scaled down to it"
    )


class TrainingConfig(Settings):
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1, description="samples of a step, over all workers")
    checkpoint_epochs: int = Field(5, ge=1, description="epochs from one checkpoint to the next")
    include_validation: bool = Field(
        False, description="train on the validation images too and keep the last epoch's network: for a chosen recipe"
    )


class EvaluationConfig(Settings):
    certifier: Literal[Certifier, "auto"] = Field(
        "auto", description="auto: lipschitz for networks with a Lipschitz constant, else interval"
    )
    sound: bool = Field(False, description="certificates account for float32 rounding")
    attack: AttackConfig = AttackConfig()
    batch_size: int = Field(1000, ge=1, description="samples that are scored together")
    mean_images: int = Field(
        5000,
        ge=1,
        description="training images from which SortNet's running means are computed anew before it is scored after an "
        "epoch; for the network that is kept, from all of them",
    )


class ComputeConfig(Settings):
    workers: int = Field(1, ge=1, le=10_000, description="Ray Train workers; each takes an equal part of every batch")
    cpus_per_worker: int = Field(
        1, ge=1, le=10_000, description="CPUs and threads of a worker; part of what fixes the bits"
    )
    gpus_per_worker: float = Field(
        1.0, gt=0, le=1, description="where there are GPUs: a worker's share of one; 0.25 puts four trainings on each"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is a device, else cpu")


class Experiment(Settings):
    """Every setting of a run. Lengths (eps, theta, radii) are in pixels of [0, 1]."""

    method: str = Field("l_inf-dist Net", description="name in comparison tables")
    dataset: str = Field(description="a data set by its name")
    eps: float = Field(ge=0, le=1, description="radius at which accuracy is attacked and certified")
    seed: int = Field(0, ge=0, lt=2**63)
    augmentation: AugmentationConfig = AugmentationConfig()
    model: ModelConfig
    objective: ObjectiveConfig
    p_schedule: PSchedule = PSchedule()
    eps_ramp: EpsRamp = EpsRamp()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    compute: ComputeConfig = ComputeConfig()

    def settings(self) -> dict[str, Any]:
        """All settings by dotted path, in the order of their definition."""
        return dict(_flatten(self.model_dump(mode="json")))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def digest(self) -> str:
        """A name for these settings: equal for equal ones alone."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()[:32]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        pairs += _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
    return pairs


def recipe_names() -> list[str]:
    """The shipped recipes, by name."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_experiment(recipe: str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a recipe (a shipped name, or the path of a YAML file) with overrides `key.path=value`.

    An override of a section's `kind` keeps the section's settings that the new kind has too, and drops the others.

    Raises:
        SettingError: no such recipe, or a setting that is unknown, missing or wrong.
    """
    return build_experiment(read_recipe(recipe), dict(map(parse_override, overrides)))


def read_recipe(recipe: str) -> dict[str, Any]:
    """The settings written in a recipe, not yet validated.

    Raises:
        SettingError: there is no such recipe, or it is not a YAML mapping.
    """
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPES / f"{recipe}.yaml"
    try:
        tree = yaml.safe_load(path.read_text())
        tree = _copy(tree) if isinstance(tree, dict) else tree  # fails here on a tree that contains itself
    except FileNotFoundError:
        raise SettingError(
            f"recipe={recipe}: there is no such file"
            if recipe.endswith((".yaml", ".yml"))
            else f"recipe={recipe}: unknown{_suggest(recipe, recipe_names())}; `linflab recipes` lists the recipes, "
            "and the path of a YAML file will do too"
        ) from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: the 31st of February
        raise SettingError(f"recipe={recipe}: can't be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise SettingError(f"recipe={recipe}: must be a YAML mapping of settings")
    return tree


def parse_override(text: str) -> tuple[str, Any]:
    """`model.width=128` -> ("model.width", 128); the value is read as YAML, or is a fraction, as in eps=8/255.

    Raises:
        SettingError: it has no key or no `=`.
    """
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise SettingError(f"override={text}: must be written key=value, for example model.width=128")
    if fraction := re.fullmatch(r"(\d+)/(\d*[1-9]\d*)", value):
        return path, int(fraction[1]) / int(fraction[2])
    try:
        return path, yaml.safe_load(value)
    except (ValueError, yaml.YAMLError):
        return path, value


def build_experiment(tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> Experiment:
    """The experiment of a tree of settings with overrides by dotted path.

    Raises:
        SettingError: a setting is unknown, missing or wrong.
    """
    merged = _copy(tree)
    # kinds first, outer ones before inner ones: they decide which settings a section can have
    for path, value in sorted(overrides.items(), key=lambda item: (not item[0].endswith(".kind"), item[0].count("."))):
        *sections, name = path.split(".")
        node = merged
        for depth, section in enumerate(sections):
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                parent = ".".join(sections[: depth + 1])
                raise SettingError(f"{path}={value}: {parent} is a single setting and has none inside")
        before = node.get(name)
        node[name] = value
        if name == "kind" and before not in (None, value):
            _keep_known(node, sections, merged)
    try:
        experiment = Experiment.model_validate(merged)
    except ValidationError as error:
        raise SettingError(_describe(error, merged)) from None
    settings = experiment.settings()
    for path, value in _flatten(merged):
        if isinstance(value, bool) and not isinstance(settings.get(path), bool):  # to pydantic, true is 1
            raise SettingError(f"{path}={str(value).lower()}: must be a number or a name, not true or false")
    if experiment.training.batch_size % experiment.compute.workers:
        raise SettingError(
            f"training.batch_size={experiment.training.batch_size}: must be a multiple of "
            f"compute.workers={experiment.compute.workers}, so that all workers take equal parts"
        )
    _check_together(experiment)
    return experiment


def _keep_known(node: dict[str, Any], path: Sequence[str], tree: Mapping[str, Any]) -> None:
    """Leave of a section, which got another kind, the settings that this kind has too."""
    try:
        known = _section(path, tree).model_fields
    except (KeyError, AttributeError, IndexError):  # refused in the end, by its name
        known = {}
    for key in [key for key in node if key not in known and key != "kind"]:
        del node[key]


def _check_together(experiment: Experiment) -> None:
    """Check what network, objective and workers ask of one another."""
    model, objective, workers = experiment.model, experiment.objective, experiment.compute.workers
    kind, certifier = model.kind, experiment.evaluation.certifier
    if kind not in LIPSCHITZ_NETS and objective.kind in ("hinge", "clipped_hinge_cross_entropy"):
        raise SettingError(
            f"objective.kind={objective.kind}: needs a Lipschitz constant, and model.kind={kind} has none; must be "
            "worst_case_cross_entropy or worst_case_hinge, or else cross_entropy or adversarial_cross_entropy"
        )
    bound = getattr(objective, "bound", "interval")
    if bound != "interval" and kind in WITHOUT_RELU:
        raise SettingError(
            f"objective.bound={bound}: is of ReLU networks, which model.kind={kind} is not; interval will do"
        )
    penalty = getattr(objective, "penalty", 0.0)
    if penalty and kind in WITHOUT_RELU:
        raise SettingError(f"objective.penalty={penalty:g}: is on ReLUs, and model.kind={kind} has none; 0 will do")
    if experiment.optimizer.lp_weight_decay and kind not in DISTANCE_NETS:
        raise SettingError(
            f"optimizer.lp_weight_decay={experiment.optimizer.lp_weight_decay:g}: model.kind={kind} has no distance "
            "layers; optimizer.weight_decay will do"
        )
    if getattr(model, "batch_norm", False) and experiment.training.batch_size == 1:
        raise SettingError("training.batch_size=1: model.batch_norm=true needs more than one sample")
    if kind == "group_sort" and experiment.evaluation.sound and certifier in ("auto", "lipschitz"):
        raise SettingError(
            f"evaluation.sound=true: is not known of lipschitz certificates of model.kind={kind}; "
            "evaluation.certifier=interval will do"
        )
    if model.kind == "linf_dist_hybrid" and model.net.kind != "linf_dist_conv_net" and model.net.depth < 2:
        raise SettingError("model.net.depth=1: must be at least 2, as the head takes the place of the last layer")
    if (certifier == "lipschitz" and kind not in LIPSCHITZ_NETS) or (certifier == "crown" and kind in LIPSCHITZ_NETS):
        lacks = "no Lipschitz constant" if certifier == "lipschitz" else "no ReLU or tanh to bound by lines"
        raise SettingError(f"evaluation.certifier={certifier}: model.kind={kind} has {lacks}; interval will do")
    sort_net = model.net if model.kind == "linf_dist_hybrid" else model
    if sort_net.kind == "sort_net" and GROUP % workers:
        raise SettingError(
            f"compute.workers={workers}: {GROUP} samples of SortNet share a subset; workers must divide {GROUP}"
        )
    if sort_net.kind == "sort_net" and objective.kind == "adversarial_cross_entropy":
        raise SettingError(
            "objective.kind=adversarial_cross_entropy: SortNet in training is another network at every step, which an "
            "attack can't follow; any other objective will do"
        )


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _describe(error: ValidationError, tree: Mapping[str, Any]) -> str:
    """The first of pydantic's complaints as one line: dotted path, value, what would do."""
    complaint = error.errors()[0]
    path: list[str] = []
    node: Any = tree
    for part in complaint["loc"]:
        # a union's tag is part of pydantic's location, but not of the path
        if isinstance(node, Mapping) and part not in node and part is not complaint["loc"][-1]:
            continue
        path.append(str(part))
        node = node.get(part) if isinstance(node, Mapping) else None
    name = ".".join(path)
    if complaint["type"] == "extra_forbidden":
        known = list(_section(path[:-1], tree).model_fields)
        return f"{name}={node}: unknown setting{_suggest(path[-1], known)}; known here: {', '.join(known)}"
    if complaint["type"] == "missing":
        return f"{name}: missing; this setting has no default"
    if complaint["type"] == "value_error":  # raised by our own validators, which name the settings
        return f"{name}: {complaint['ctx']['error']}"
    if complaint["type"] in ("union_tag_invalid", "union_tag_not_found"):
        given = complaint["input"].get("kind") if isinstance(complaint["input"], Mapping) else complaint["input"]
        kinds = [model.model_fields["kind"].default for model in _models(_section(path[:-1], tree), path[-1])]
        what = "missing" if given is None else "unknown"
        return f"{name}.kind={given}: {what}; must be one of {', '.join(kinds)}".replace("=None", "")
    message = complaint["msg"][0].lower() + complaint["msg"][1:]
    return f"{name}={complaint['input']}: {message}"


def _section(path: Sequence[str], tree: Mapping[str, Any]) -> type[BaseModel]:
    """The model of the section at this path, given the kinds chosen in the tree."""
    section: type[BaseModel] = Experiment
    node: Any = tree
    for part in path:
        node = node[part]
        models = _models(section, part)
        kind = node.get("kind")
        section = next(
            (m for m in models if "kind" in m.model_fields and m.model_fields["kind"].default == kind), models[0]
        )
    return section


def _models(section: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """The models that a setting of a section can have, one for each kind."""
    annotation = section.model_fields[name].annotation
    options = [annotation, *getattr(annotation, "__args__", ())]
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
