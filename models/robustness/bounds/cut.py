"""Cut of a traced network into two parts, between which a single value passes."""

from collections.abc import Sequence

from linflab.models.networks.hybrid import LinfDistHybrid
from linflab.models.networks.layers import GroupSort
from linflab.models.robustness.bounds.relaxations import has_relaxation
from linflab.models.robustness.bounds.steps import Trace, TraceStep


def cut_trace(traced: Trace, activations: int) -> tuple[Trace, Trace]:
    """Return the two parts of a network, the second of which has a number of activation layers.

    The first part ends as early as possible: at an activation layer, at a sum of branches, or at the network's input.

    Args:
        traced: Steps of the network.
        activations: Number of activation layers in the second part.

    Raises:
        ValueError: If there is no place with that number of activation layers behind it where a single value passes.
    """
    steps = _needed_steps(traced)
    total, places = sum(map(_is_activation, steps)), _find_places(traced, steps)
    if activations > total:
        raise ValueError(
            f"attacked_activations={activations}: must be at most {total}, the number of activation layers of the "
            "network; use a smaller number"
        )
    if activations not in places:
        numbers = ", ".join(map(str, sorted(places)))
        raise ValueError(
            f"attacked_activations={activations}: the network cannot be cut there, since a connection bypasses the "
            f"cut; use one of {numbers}"
        )
    count, name = places[activations]
    return Trace(traced.input, steps[:count], name), Trace(name, steps[count:], traced.output)


def _needed_steps(traced: Trace) -> list[TraceStep]:
    """Return the steps that the output depends on, in order."""
    needed, steps = {traced.output}, list[TraceStep]()
    for step in reversed(traced.steps):
        if step.output in needed:
            needed.update(step.inputs)
            steps.append(step)
    return steps[::-1]


def _is_activation(step: TraceStep) -> bool:
    return has_relaxation(step.layer) or isinstance(step.layer, GroupSort)


def _find_places(traced: Trace, steps: Sequence[TraceStep]) -> dict[int, tuple[int, str]]:
    """Return for each possible number of activation layers behind the cut: steps before it, and value at the cut."""
    places, remaining = dict[int, tuple[int, str]](), sum(map(_is_activation, steps))
    last_uses = {name: k for k, step in enumerate(steps) for name in step.inputs} | {traced.output: len(steps)}
    alive = {traced.input}
    for count in range(len(steps) + 1):
        if len(alive) == 1:
            (name,) = alive
            places.setdefault(remaining, (count, name))
        if count < len(steps):
            step = steps[count]
            remaining -= _is_activation(step)
            alive = {one for one in (*alive, step.output) if last_uses[one] > count}
    return places


def head_trace(network: LinfDistHybrid) -> Trace:
    """Return the head of a hybrid as a trace, whose input are the features."""
    names = ["features", *(f"head.{k}" for k in range(len(network.head)))]
    steps = [TraceStep(layer, (names[k],), names[k + 1]) for k, layer in enumerate(network.head)]
    return Trace(names[0], steps, names[-1])
