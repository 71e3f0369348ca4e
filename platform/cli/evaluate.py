"""`linflab evaluate`, `certify` and `import-weights`: commands on trained weights."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from linflab.platform.cli.options import (
    DEFAULT_STORAGE,
    SOUND,
    AsJson,
    Overrides,
    StorageFolder,
    check_writable,
    parse_eps_list,
)
from linflab.platform.cli.output import console, print_rows
from linflab.platform.errors import InputError, TrainingError
from linflab.reports.tables import format_eps


def evaluate(
    run_or_weights: Annotated[str, typer.Argument(metavar="RUN_OR_WEIGHTS", help="Run id or name, or path of weights")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Evaluation settings to override, such as evaluation.attack.steps=100")
    ] = None,
    eps: Annotated[
        str, typer.Option(help="Comma-separated eps, for pixel values in [0, 1]; default: that of the run")
    ] = "",
    certifier: Annotated[
        str,
        typer.Option(
            help="lipschitz, ibp, crown, alpha_crown, complete, or cascade, which decides image by image and keeps "
            "each verdict; default: that of the run"
        ),
    ] = "",
    timeout: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="Time per image of complete and cascade; default: that of the run"),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Number of test images, a fixed random sample; default: all"),
    ] = None,
    sound: Annotated[bool | None, typer.Option("--sound/--real-arithmetic", help=SOUND)] = None,
    attacks: Annotated[
        str,
        typer.Option(
            help="Comma-separated attacks: autoattack, pgd, surrogate_pgd, apgd, apgd_ce, apgd_dlr, targeted_apgd, "
            "targeted_apgd_dlr, fab, square; or none; default: those of the run"
        ),
    ] = "",
    radii_dir: Annotated[
        Path | None,
        typer.Option(help="Directory for the certified radius of every image, the curve over eps and a histogram"),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, metavar="N", help="Ray workers that share the images; 0 runs without Ray")
    ] = 0,
    storage_dir: StorageFolder = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> None:
    """Evaluate trained weights on the test set: clean, robust and certified accuracy at each eps.

    An image counts as robust if every attack that ran fails on it.
    """
    bounds = parse_eps_list(eps)
    if timeout == 0:
        raise InputError("timeout=0: must be positive; use 0.1 for almost no branch and bound")
    if certifier == "cascade":
        if overrides or attacks:
            given = f"attacks={attacks}" if attacks else (overrides or [""])[0]
            raise InputError(
                f"{given}: is not supported with --certifier cascade, which has its own attack; leave it out"
            )
        if radii_dir is not None:
            check_writable("radii-dir", radii_dir)
        from linflab.platform.cli.cascade import evaluate_by_cascade

        evaluate_by_cascade(
            run_or_weights,
            bounds,
            sound is not False,
            timeout,
            images,
            workers,
            radii_dir,
            storage_dir,
            as_json,
        )
        return
    if images is not None and radii_dir is not None:
        raise InputError(f"images={images}: is not supported with --radii-dir, which writes all images; leave one out")
    settings = [*(overrides or [])]
    settings += [f"evaluation.certifier={certifier}"] if certifier else []
    if sound is not None or not any(setting.startswith("evaluation.sound=") for setting in settings):
        settings += [f"evaluation.sound={sound is not False}".lower()]
    from linflab.models.robustness.attacks import AttackMethod
    from linflab.platform.config.own_parts import import_own_parts

    import_own_parts()
    kinds = [kind.strip() for kind in attacks.split(",")] if attacks else []
    if kinds and kinds != ["none"] and not set(kinds) <= set(AttackMethod.registry):
        raise InputError(
            f"attacks={attacks}: must be none or a comma-separated list; use {', '.join(AttackMethod.registry)}"
        )
    if kinds == ["none"] and any(setting.startswith("evaluation.attack.") for setting in settings):
        raise InputError("attacks=none: is not supported with settings of evaluation.attack; leave one of them out")
    settings += [f"evaluation.attack.methods=[{','.join(kinds)}]"] if kinds not in ([], ["none"]) else []
    if radii_dir is not None:
        check_writable("radii-dir", radii_dir)
    from linflab.platform.cli.progress import ProgressLine
    from linflab.platform.results.evaluate import evaluate_weights, log_evaluation, save_evaluation, to_dict
    from linflab.platform.results.load import find_weights

    path, storage, run = find_weights(run_or_weights, storage_dir)
    with ProgressLine(console, "stage=evaluation", "images") as line:
        result = evaluate_weights(
            path,
            settings,
            bounds,
            kinds != ["none"],
            radii_dir is not None,
            workers,
            lambda report: line.update(report.done, report.total),
            images,
            timeout,
        )
    if as_json:
        typer.echo(json.dumps(to_dict(result)))
    else:
        accuracies = ["clean", "robust", "certified"]
        rows = [dataclasses.asdict(row) for row in result.results]
        cells = [
            {"eps": format_eps(row["eps"])}
            | {name: "-" if row[name] is None else f"{100 * row[name]:.2f}" for name in accuracies}
            for row in rows
        ]
        print_rows(cells, ["eps", *accuracies], as_json=False)
        console.print(f"\nIn percent. {result.notes}")
    sys.stdout.flush()  # show results before logging, which may fail
    problems: list[str] = []
    if storage is not None and storage.is_writable:
        try:
            log_evaluation(storage, run, result)
        except TrainingError as error:
            problems.append(str(error))
    elif storage is not None:
        sys.stderr.write(f"linflab: results are not logged: {storage.root} is not writable\n")
    if radii_dir is not None:
        try:
            files = save_evaluation(radii_dir, result)
        except OSError as error:
            files = []
            problems.append(f"radii-dir={radii_dir}: files cannot be written ({error}); use another directory")
        for file in [] if as_json else files:
            console.print(f"  {file}")
    num_violations = sum(row.certificate_violations or 0 for row in result.results)
    if num_violations:
        hint = "" if result.sound else "; rerun with --sound to account for float32 rounding"
        problems.append(
            f"certificate violation: attacks succeeded on {num_violations} images certified by {result.certifier}{hint}"
            "; see docs/concepts/certificates.md"
        )
    if problems:
        raise TrainingError("; ".join(problems))


def certify(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Run id or name, or path of weights; with --vnnlib, an ONNX file")
    ],
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Image files, .npy arrays (C, H, W) or (N, C, H, W) of the network's size, or directories"),
    ] = None,
    certifier: Annotated[
        str,
        typer.Option(
            help="lipschitz, ibp, crown, alpha_crown, complete, or cascade (images only); auto selects one by the kind "
            "of network, and for properties the tighter of ibp and crown, and splits of neurons"
        ),
    ] = "auto",
    eps: Annotated[
        str, typer.Option(help="Radius to certify, for pixel values in [0, 1]; default: certified radii")
    ] = "",
    sound: Annotated[bool, typer.Option("--sound/--real-arithmetic", help=SOUND)] = True,
    vnnlib: Annotated[Path | None, typer.Option(help="VNN-LIB property to verify, instead of images")] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Time limit of a property (default: 60), or per image of complete and cascade (default: that of the "
            "run)",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File for the answer to a property, and for its counterexample")
    ] = None,
    storage_dir: StorageFolder = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> None:
    """Certify your own images, or verify a VNN-LIB property of an ONNX model.

    Images are classified, and each gets the radius within which its prediction is constant, for pixel values in [0, 1].
    With `--eps`, each gets a status instead: certified, falsified (an image within eps has another class) or unknown.
    Arrays have uint8 values from 0 to 255, or floats in [0, 1]. EXIF rotation is applied; images with transparency,
    several frames or more than 8 bits per channel are rejected.

    The answer to a property is unsat (it holds), sat (with a counterexample), unknown or timeout, as in VNN-COMP.
    """
    if vnnlib is not None:
        if images:
            raise InputError(f"vnnlib={vnnlib}: is not supported with images; use one of them")
        if not model.lower().endswith(".onnx"):
            raise InputError(f"{model}: must be an ONNX file for --vnnlib; use `linflab export {model} --format onnx`")
        from linflab.platform.cli.exchange import certify_property

        if eps:
            raise InputError(f"eps={eps}: is not supported with --vnnlib, whose property has its own box; leave it out")
        certify_property(model, vnnlib, certifier, sound, 60.0 if timeout is None else timeout, output, as_json)
        return
    if not images:
        raise InputError("images: not given; use image files, or --vnnlib with an ONNX file")
    if output is not None:
        raise InputError(f"output={output}: requires --vnnlib; use --json to save the results for images")
    radii = parse_eps_list(eps)
    if len(radii) > 1:
        raise InputError(f"eps={eps}: must be one number from 0 to 1; run the command once for each eps")
    from linflab.platform.cli.progress import ProgressLine
    from linflab.platform.results.certify import certify_images
    from linflab.platform.results.load import find_weights

    path, _, _ = find_weights(model, storage_dir)
    with ProgressLine(console, "stage=certification", "images") as line:
        results = certify_images(path, images, certifier, sound, radii[0] if radii else None, timeout, line.update)
    rows = [{name: value for name, value in dataclasses.asdict(one).items() if value is not None} for one in results]
    if radii:
        print_rows(rows, ["image", "prediction", "status", "certifier", "seconds"], as_json)
        return
    if not as_json:  # round down to stay certified
        rows = [{**row, "radius": f"{math.floor(1e4 * row['radius']) / 1e4:.4f}"} for row in rows]
    print_rows(rows, ["image", "prediction", "radius", "certifier"], as_json)


def import_weights(
    file: Annotated[Path, typer.Argument(help="Published weights of an l_inf-dist net or SortNet")],
    recipe: Annotated[str, typer.Option(help="Recipe of the same network, or path of a YAML file")],
    output: Annotated[Path, typer.Option(help="Weights file to write")],
    overrides: Overrides = None,
) -> None:
    """Convert published weights of l_inf-dist nets and SortNet for `linflab evaluate`."""
    from linflab.platform.config.overrides import load_config
    from linflab.platform.training.published_weights import import_weights as convert

    experiment = load_config(recipe, overrides or [])
    count = convert(file, experiment, output)
    console.print(f"Converted {count} tensors of {file} to {output}, for the network of {recipe}.")
