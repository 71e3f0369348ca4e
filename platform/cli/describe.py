"""`linflab recipes`, `describe`, `space` and `schema`: available recipes and search spaces."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from linflab.platform.cli.options import AsJson, Overrides, Recipe, read_space
from linflab.platform.cli.output import console, print_rows, print_warning
from linflab.platform.errors import InputError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from torch import nn

    from linflab.platform.config.experiment import ExperimentConfig

space_app = typer.Typer(help="List and show search spaces.", no_args_is_help=True)
MAX_YAML_WIDTH = 44  # width up to which the descriptions are aligned


def recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    from linflab.models.numbers import read_fraction
    from linflab.platform.config.overrides import read_recipe, recipe_names
    from linflab.reports.tables import format_eps

    rows = []
    for name in recipe_names():
        tree = read_recipe(name)
        row = {key: tree.get(key) for key in ("method", "dataset")} | {"recipe": name}
        eps = read_fraction(tree.get("eps"))
        rows.append(row | {"eps": eps if as_json else format_eps(eps)})
    print_rows(rows, ["recipe", "method", "dataset", "eps"], as_json)


def describe(recipe: Recipe, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show the settings, layers, parameters and FLOPs of a recipe, and the cost of a training step."""
    from linflab.models.networks.cost import count_parameters, layer_costs
    from linflab.platform.config.overrides import load_config, radius_note

    experiment = load_config(recipe, overrides or [])
    print_warning(radius_note(recipe, overrides or []))
    network, input_shape = meta_network(experiment)
    layers = [dataclasses.asdict(layer) for layer in layer_costs(network, input_shape)]
    parameters, flops = count_parameters(network), sum(layer["flops"] for layer in layers)
    forward = experiment.training.batch_size * flops
    moments = experiment.optimizer.num_moments
    step = {"forward_flops": forward, "backward_flops": 2 * forward, "state_bytes": 4 * (2 + moments) * parameters}
    if as_json:
        cost = {"parameters": parameters, "flops": flops, "layers": layers, "step": step}
        typer.echo(
            json.dumps({**cost, "settings": experiment.to_flat_dict(), "descriptions": experiment.descriptions()})
        )
        return
    _print_settings(experiment)
    console.print()
    for layer in layers:
        layer["output"] = " x ".join(map(str, layer["output_shape"]))
        layer |= {key: f"{layer[key]:,}" for key in ("parameters", "flops")}
    print_rows(layers, ["name", "kind", "output", "parameters", "flops"], as_json=False)
    console.print(f"\n{parameters:,} parameters, {flops:,} FLOPs per image")
    console.print(
        f"A step on {experiment.training.batch_size} images: {forward:,} FLOPs for the forward pass, twice that for "
        f"the backward pass; {step['state_bytes'] / 2**20:,.1f} MiB for weights, gradients and optimizer state"
    )


def _print_settings(experiment: "ExperimentConfig") -> None:
    """Print settings as YAML, each with its description as a comment."""
    descriptions, path = experiment.descriptions(), list[str]()
    lines = []
    for line in experiment.to_yaml().splitlines():
        name, colon, _ = line.strip().partition(":")
        if colon and not line.strip().startswith("- "):
            depth = (len(line) - len(line.lstrip())) // 2
            path = [*path[:depth], name]
        lines.append((line, descriptions.get(".".join(path), "") if colon else ""))
    width = min(max(len(line) for line, _ in lines), MAX_YAML_WIDTH)
    for line, description in lines:
        console.print(f"{line:{width}}  # {description}" if description else line)


@space_app.command("list")
def space_list(as_json: AsJson = False) -> None:
    """List the shipped search spaces."""
    from linflab.search_spaces.space import load_space, space_names

    rows = [{"space": name, "description": load_space(name).description} for name in space_names()]
    print_rows(rows, ["space", "description"], as_json)


@space_app.command("show")
def space_show(
    name: Annotated[str, typer.Argument(help="Search space name, or path of a YAML file")],
    as_json: AsJson = False,
) -> None:
    """Show the settings that a search space varies, and their values."""
    space = read_space(name)
    if as_json:
        typer.echo(space.model_dump_json())
        return
    rows = [{"setting": path, "values": str(distribution)} for path, distribution in space.parameters.items()]
    console.print(space.description)
    print_rows(rows, ["setting", "values"], as_json=False)
    for point in space.initial_points:
        console.print("initial point: " + ", ".join(f"{path}={value}" for path, value in point.items()))


def json_schema(what: Annotated[str, typer.Argument(metavar="recipe|space", help="What to describe")]) -> None:
    """Print the JSON schema of recipes or search spaces, for editors that validate and complete YAML."""
    from linflab.platform.config.experiment import ExperimentConfig
    from linflab.platform.config.own_parts import import_own_parts
    from linflab.search_spaces.space import SearchSpace

    import_own_parts()
    models: dict[str, type[BaseModel]] = {"recipe": ExperimentConfig, "space": SearchSpace}
    if what not in models:
        raise InputError(f"schema={what}: not found; use {' or '.join(models)}")
    typer.echo(json.dumps(models[what].model_json_schema(), indent=1))


def meta_network(experiment: "ExperimentConfig") -> tuple["nn.Module", tuple[int, ...]]:
    """Return the network of a config on the meta device, without values, and its image shape (C, H, W)."""
    import torch

    from linflab.platform.data.datasets import dataset_info
    from linflab.platform.training.weights import build_network, image_shape

    with torch.device("meta"):
        return build_network(experiment), image_shape(experiment, dataset_info(experiment.dataset))
