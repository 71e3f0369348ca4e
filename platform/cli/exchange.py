"""`linflab export`, and `linflab certify` of VNN-LIB properties."""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from linflab.platform.cli.options import DEFAULT_STORAGE, StorageFolder, parse_eps_list
from linflab.platform.cli.output import console, print_files
from linflab.platform.errors import InputError

DEFAULT_COUNT = 20  # images with properties
MAX_IMAGES = 10_000


def export(
    run_or_weights: Annotated[str, typer.Argument(metavar="RUN_OR_WEIGHTS", help="Run id or name, or path of weights")],
    format: Annotated[
        Literal["onnx", "vnnlib", "torchscript", "safetensors"],
        typer.Option(help="File format; vnnlib: ONNX, and VNN-LIB properties of test images"),
    ],
    output_dir: Annotated[Path, typer.Option(help="New or empty directory")],
    images: Annotated[
        str,
        typer.Option(
            help="Test images with a VNN-LIB property: a number of images, or comma-separated positions such as 0,5,7; "
            f"default: the first {DEFAULT_COUNT}"
        ),
    ] = "",
    eps: Annotated[
        str, typer.Option(help="Radius of the properties, for pixel values in [0, 1]; default: eps of the run")
    ] = "",
    float16: Annotated[
        bool, typer.Option("--float16", help="Round weights to float16, and evaluate again; requires safetensors")
    ] = False,
    storage_dir: StorageFolder = DEFAULT_STORAGE,
) -> None:
    """Export a trained network for other tools, with an example and a manifest of hashes and results.

    The exported network includes its normalization, so inputs are pixel values in [0, 1]. Distance layers are written
    at p = inf with standard operators.
    """
    if format != "vnnlib" and (images or eps):
        raise InputError(f"format={format}: has no properties; use --format vnnlib, or neither --images nor --eps")
    if float16 and format != "safetensors":
        raise InputError(f"format={format}: has float32 weights; use --format safetensors, or leave out --float16")
    radii = parse_eps_list(eps)
    if len(radii) > 1:
        raise InputError(f"eps={eps}: must be one number from 0 to 1; export each eps to a directory of its own")
    from linflab.platform.results.export import PropertyImages, export_network

    chosen = PropertyImages(_parse_images(images), radii[0] if radii else None)
    print_files(export_network(run_or_weights, storage_dir, format, output_dir, chosen, float16), "Files:")


def push(
    run_or_weights: Annotated[str, typer.Argument(metavar="RUN_OR_WEIGHTS", help="Run id or name, or path of weights")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository of the Hugging Face Hub")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private")] = False,
    storage_dir: StorageFolder = DEFAULT_STORAGE,
) -> None:
    """Upload a trained network to the Hugging Face Hub, with its config and a manifest of hashes and results.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    from linflab.platform.results.export import PropertyImages, export_network
    from linflab.platform.results.sharing import parse_repository, push_folder

    parse_repository(repository)
    with tempfile.TemporaryDirectory(prefix="linflab-") as temporary:
        folder = Path(temporary) / "export"
        export_network(run_or_weights, storage_dir, "safetensors", folder, PropertyImages([]))
        source = push_folder(folder, repository, private)
    console.print(f"Uploaded. Load the network with linflab.load({source!r}), or `linflab pull {source}`.")


def pull(
    source: Annotated[str, typer.Argument(help="hf://OWNER/NAME with an optional @REVISION, or an https URL")],
    output_dir: Annotated[Path, typer.Option(help="New or empty directory")],
) -> None:
    """Download a network that was pushed or exported as safetensors, and check its hash."""
    from linflab.platform.results.sharing import copy_network, fetch_weights, is_remote
    from linflab.platform.training.weights import load_weights

    weights = fetch_weights(source if is_remote(source) else f"hf://{source}")
    load_weights(weights)
    print_files(copy_network(weights, output_dir), "Files:")


def _parse_images(text: str) -> list[int]:
    """Return positions of test images from a count or a comma-separated list.

    Raises:
        InputError: If the text is neither.
    """
    parts = [part.strip() for part in text.split(",")] if text else [str(DEFAULT_COUNT)]
    if parts[-1] == "" and len(parts) > 1:  # one position: "7,"
        parts.pop()
    if all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        numbers = [int(part) for part in parts]
        if "," not in text:
            numbers = list(range(numbers[0])) if numbers[0] <= MAX_IMAGES else []
        if 0 < len(set(numbers)) == len(numbers) <= MAX_IMAGES:
            return numbers
    raise InputError(
        f"images={text[:40]}: must be a number of images up to {MAX_IMAGES}, or different comma-separated positions; "
        "use --images 20 or --images 0,5,7"
    )


def certify_property(
    model: str, vnnlib: Path, certifier: str, sound: bool, timeout: float, output: Path | None, as_json: bool
) -> None:
    """Verify a VNN-LIB property of an ONNX model, and print the answer.

    Args:
        model: Path of the ONNX file.
        vnnlib: VNN-LIB file.
        certifier: Name of the certifier, or auto.
        sound: Whether `unsat` accounts for float32 rounding.
        timeout: Time limit in seconds.
        output: File to write the answer to, if given.
        as_json: Whether to print JSON.

    Raises:
        InputError: If a file cannot be read or written, or is not supported.
    """
    from linflab.platform.results.verify import verify_files
    from linflab.reports.outputs import write_text_atomic

    result = verify_files(Path(model), vnnlib, certifier, sound, timeout)
    if output is not None:
        try:
            write_text_atomic(output, result.to_text())
        except OSError as error:
            raise InputError(f"output={output}: cannot be written ({error}); use another file") from None
    if as_json:
        inputs, outputs = (None if one is None else one.tolist() for one in (result.inputs, result.outputs))
        row = {"answer": result.answer, "certifier": result.certifier, "seconds": result.seconds}
        typer.echo(json.dumps(row | {"inputs": inputs, "outputs": outputs}))
    elif output is not None:
        typer.echo(result.answer)
    elif console.is_terminal:
        console.print(result.to_short_text(), end="")
        if result.inputs is not None:
            console.print("All values: use --output FILE, in the format of VNN-COMP, or --json.")
    else:
        console.print(result.to_text(), end="")
