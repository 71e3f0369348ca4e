"""Names of methods, derived from the kinds of network, objective and bound of a run.

A run's setting `method` is free text. Tables therefore compare kinds: the values of the settings in `KINDS`.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import count

NETWORK_KINDS = ("model.kind", "model.backbone.kind")
KINDS = (*NETWORK_KINDS, "objective.kind", "objective.bound")

# Methods with distance or sorting layers have the name of their network. If the objective is one of the usual ones
# below, the name omits it.
_NETWORKS = {
    "linf_dist_mlp": "l_inf-dist Net",
    "linf_dist_conv_net": "l_inf-dist Net",
    "sort_net": "SortNet",
    "group_sort": "Group Sort",
    "l_inf_nearest": "l_inf nearest neighbor",
}
_UNTRAINED = ("l_inf_nearest",)  # networks that store training images; they have no objective
_MARGIN_OBJECTIVES = ("hinge", "clipped_hinge_cross_entropy")
_WORST_CASE_OBJECTIVES = ("worst_case_cross_entropy", "worst_case_hinge")
_BOUNDS = {
    "ibp": "IBP",
    "crown_ibp": "CROWN-IBP",
    "crown_ibp_fused": "CROWN-IBP (loss fusion)",
    "dual": "CAP",
    "hybrid_zonotope": "DiffAI",
}
_TRAININGS = {
    "cross_entropy": "Standard",
    "adversarial_cross_entropy": "PGD",
    "sabr": "SABR",
    "mtl_ibp": "MTL-IBP",
    "cc_ibp": "CC-IBP",
    "exp_ibp": "EXP-IBP",
    "taps": "TAPS",
    "staps": "STAPS",
    "colt": "COLT",
    "pvt": "after PVT",
}


def kind_values(settings: Mapping[str, object]) -> tuple[str, ...]:
    """Return the kinds of a run as text, in the order of `KINDS`; empty text for missing ones.

    Args:
        settings: Settings by dotted path, as values or as text.
    """
    return tuple(_text(settings.get(path)) for path in KINDS)


def method_name(settings: Mapping[str, object]) -> str:
    """Return the name of a method in papers, derived from its network, objective and bound.

    Args:
        settings: Settings by dotted path, as values or as text.

    Returns:
        The name, such as `l_inf-dist Net+MLP` or `CROWN-IBP`; empty if the network or objective is unknown.
    """
    model, net, objective, bound = kind_values(settings)
    if not model or not objective:
        return ""
    if model in _UNTRAINED:
        return _NETWORKS[model]
    if model == "ensemble":
        return _name_by_networks(settings)
    training = _training(objective, bound)
    hybrid = model == "linf_dist_hybrid"
    network = _NETWORKS.get(net if hybrid else model)
    if network is None and not hybrid:
        return training
    usual = _WORST_CASE_OBJECTIVES if hybrid else _MARGIN_OBJECTIVES
    details = ["convolutional"] if "linf_dist_conv_net" in (model, net) else []
    if objective not in usual or bound not in ("", "ibp"):
        details.append(training)
    name = f"{network or net}+MLP" if hybrid else f"{network}"
    return f"{name} ({', '.join(details)})" if details else name


def _name_by_networks(settings: Mapping[str, object]) -> str:
    """Return the name of an ensemble with its members' networks, or `Ensemble` if the settings lack the members."""
    members: list[str] = []
    for index in count():
        kind = _text(settings.get(f"model.members.{index}.kind"))
        if not kind:
            break
        inner = _text(settings.get(f"model.members.{index}.backbone.kind"))
        members.append(f"{_NETWORKS.get(inner, inner)}+MLP" if inner else _NETWORKS.get(kind, kind))
    return ensemble_name(members, mirror_flags(settings.get("model.mirror"), len(members))) if members else "Ensemble"


def ensemble_name(members: Sequence[str], mirrored: Sequence[bool]) -> str:
    """Return the name of an ensemble, such as `Ensemble (IBP, 2 mirrored SortNet)`, for any order of its members.

    Args:
        members: Methods or networks of the members.
        mirrored: For each member, whether it is averaged over mirror images.
    """
    counts = Counter("mirrored " * flag + member for member, flag in zip(members, mirrored, strict=True))
    names = [name if number == 1 else f"{number} {name}" for name, number in sorted(counts.items(), key=_unmirrored)]
    return f"Ensemble ({', '.join(names)})"


def mirror_flags(value: object, members: int) -> tuple[bool, ...]:
    """Return for each member of an ensemble whether it is averaged over mirror images.

    Args:
        value: Setting `model.mirror`, as value or as text.
        members: Number of members.
    """
    flags = tuple(flag == "true" for flag in re.findall("true|false", _text(value).lower()))
    return flags if len(flags) == members else (False,) * members


def _unmirrored(network: tuple[str, int]) -> tuple[str, bool]:
    """Return a sort key for a network's name and number: without case, mirrored networks before others."""
    name = network[0].removeprefix("mirrored ")
    return name.lower(), name == network[0]


def describe_method(settings: Mapping[str, object], logged_name: object) -> str:
    """Return the name of a run's method for a table.

    If the recorded name belongs to another method, it is shown behind the derived name. Earlier versions recorded the
    method name of the recipe, even if overrides changed the method.

    Args:
        settings: Settings by dotted path, as values or as text.
        logged_name: The run's setting `method`.
    """
    derived, text = method_name(settings), _text(logged_name)
    if not text:
        return derived
    if not derived or text == derived or text not in _NAMES:
        return text
    return f"{derived} (recorded as {text})"


def _training(objective: str, bound: str) -> str:
    if objective in _TRAININGS:
        return _TRAININGS[objective]
    if objective in _WORST_CASE_OBJECTIVES:
        return _BOUNDS.get(bound or "ibp", f"worst case by {bound}")
    return objective.replace("_", " ")


def _text(value: object) -> str:
    return "" if value is None or value != value or value == "None" else str(value)


_NAMES = {
    *_TRAININGS.values(),
    *_BOUNDS.values(),
    *_NETWORKS.values(),
    *(f"{network}+MLP" for network in _NETWORKS.values() if network not in ("Group Sort", "l_inf nearest neighbor")),
}
