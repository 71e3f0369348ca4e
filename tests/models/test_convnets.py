"""Tests of the baselines' ReLU networks: published sizes, bounds, initialization and batch norm."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from linflab.models.networks.convnets import (
    CNN7Config,
    ConvNetConfig,
    DenseNetConfig,
    ReluNetConfig,
    ResNeXtConfig,
    WideResNetConfig,
    init_ibp_,
)
from linflab.models.networks.cost import count_flops, count_parameters, layer_costs
from linflab.models.networks.layers import BatchNorm1d, BatchNorm2d
from linflab.models.robustness.bounds.boxes import perturbation_box
from tests.models.real_arithmetic import crown_logit_differences, ibp_bounds, ibp_logit_differences

MNIST, CIFAR, TINY = ((1, 28, 28), 10), ((3, 32, 32), 10), ((3, 56, 56), 200)
SHAPE = (2, 16, 16)
SMALL: dict[str, ReluNetConfig] = {
    "small": ConvNetConfig(size="small"),
    "medium": ConvNetConfig(size="medium", batch_norm=True),
    "large": ConvNetConfig(size="large", ibp_initialization=True),
    "cnn7": CNN7Config(variant="tiny_imagenet", width=4, hidden_size=20),
    "resnext": ResNeXtConfig(),
    "dense_net": DenseNetConfig(),
    "wide_resnet": WideResNetConfig(widen_factor=1),
}


@pytest.mark.parametrize(
    ("config", "data", "millions", "table"),
    [
        (ConvNetConfig(), MNIST, 114, 114),
        (ConvNetConfig(), CIFAR, 151, 151),
        (ConvNetConfig(size="colt2"), MNIST, 4.94, 4.9),
        (ConvNetConfig(size="colt2"), CIFAR, 6.86, 6.9),
        (ConvNetConfig(size="colt3"), CIFAR, 11.3, None),
        (CNN7Config(), TINY, 336, None),  # the table lists 458, but the published network has 336
        (DenseNetConfig(), TINY, 567, 575),
        (ResNeXtConfig(), TINY, 62.5, 64),
        (WideResNetConfig(), TINY, 5220, 5220),
    ],
    ids=lambda value: value.kind if isinstance(value, ReluNetConfig) else None,
)
def test_flops_match_the_published_tables(
    config: ReluNetConfig, data: tuple, millions: float, table: float | None
) -> None:
    shape, classes = data
    with torch.device("meta"):
        net = config.build(shape, classes)
    flops = count_flops(net, shape) / 1e6
    assert f"{flops:.3g}" == f"{millions:.3g}"
    assert table is None or flops == pytest.approx(table, rel=0.03)


@pytest.mark.parametrize(
    ("variant", "data", "strides", "parameters", "macs"),
    [
        ("cifar", CIFAR, [1, 1, 2, 1, 1], 17_192_650, 151),  # published: 17.2 M and 151 M
        ("cifar", MNIST, [1, 1, 2, 1, 1], 13_259_338, 114),  # published: 114 M
        ("tiny_imagenet", ((3, 64, 64), 200), [1, 1, 2, 1, 2], 17_290_120, None),
        ("xu2020", TINY, [1, 1, 2, 1, 2], 13_356_936, 336),
    ],
)
def test_cnn7_variants_have_the_published_layers(
    variant: str, data: tuple, strides: list[int], parameters: int, macs: float | None
) -> None:
    """The variants since 2021 normalize the output of every layer except the last; xu2020 only of convolutions."""
    shape, classes = data
    with torch.device("meta"):
        net = CNN7Config(variant=variant).build(shape, classes)
    convolutions = [layer for layer in net if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64, 64, 128, 128, 128]
    assert [layer.stride[0] for layer in convolutions] == strides
    assert all((layer.kernel_size, layer.padding) == ((3, 3), (1, 1)) for layer in convolutions)
    kinds = [type(layer).__name__ for layer in net if not isinstance(layer, nn.Conv2d)]
    dense_norm = [] if variant == "xu2020" else ["BatchNorm1d"]
    assert kinds == ["Normalize", *["BatchNorm2d", "ReLU"] * 5, "Flatten", "Linear", *dense_norm, "ReLU", "Linear"]
    (conv, dense) = (sum(w.numel() for w in layer.parameters()) for layer in (nn.Sequential(*convolutions), net[-1]))
    assert conv == shape[0] * 9 * 64 + 64 + 64 * 64 * 9 + 64 + 64 * 128 * 9 + 128 + 2 * (128 * 128 * 9 + 128)
    assert dense == 512 * classes + classes
    assert count_parameters(net) == parameters
    assert macs is None or f"{count_flops(net, shape) / 1e6:.3g}" == f"{macs:.3g}"


@pytest.mark.parametrize("bounds", [ibp_logit_differences, crown_logit_differences])
def test_per_channel_std_equals_a_scaled_first_layer(bounds: Callable[..., torch.Tensor]) -> None:
    """Scaling the channels of the first weights commutes with zero padding. Points of the box respect the bounds."""
    torch.manual_seed(0)
    stds, shape = torch.tensor([0.15, 0.6]), (2, 6, 6)
    config = ConvNetConfig(size="strided", per_channel_std=True)
    net = config.build(shape, 4, (0.4, 0.5), stds.tolist()).double().eval()
    reference = ConvNetConfig(size="strided").build(shape, 4, (0.4, 0.5), 1.0).double().eval()
    state = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("0.")}
    reference.load_state_dict({**state, "1.weight": state["1.weight"] / stds.view(1, 2, 1, 1)}, strict=False)
    images = torch.rand(6, *shape, dtype=torch.float64)
    labels = net(images).argmax(1)
    box = perturbation_box(images, 0.01)
    with torch.no_grad():
        worst = bounds(net, box, labels)
        torch.testing.assert_close(worst, bounds(reference, box, labels))
        for corner in range(32):
            points = torch.where(torch.rand_like(images) < 0.5, *box) if corner else box.lower
            logits = net(points)
            differences = (logits - logits.gather(1, labels[:, None])).scatter(1, labels[:, None], -math.inf)
            assert (differences <= worst + 1e-9).all()


def test_layers_have_published_output_shapes() -> None:
    def shapes(config: ReluNetConfig) -> list[tuple[int, ...]]:
        return [cost.output_shape for cost in layer_costs(config.build((1, 28, 28), 10), (1, 28, 28))]

    assert shapes(ConvNetConfig(size="small")) == [(16, 13, 13), (32, 10, 10), (100,), (10,)]
    medium = [(32, 26, 26), (32, 12, 12), (64, 10, 10), (64, 4, 4), (512,), (512,), (10,)]
    assert shapes(ConvNetConfig(size="medium")) == medium
    # The stem, then both convolutions and the shortcut of each block. The first block has no shortcut.
    wide = [(16, 28, 28)] * 3 + [(32, 28, 28), (32, 14, 14), (32, 14, 14)] + [(64, 14, 14), (64, 7, 7), (64, 7, 7)]
    assert shapes(WideResNetConfig(widen_factor=1)) == [*wide, (10,)]


@pytest.mark.integration
@pytest.mark.parametrize("kind", sorted(SMALL))
def test_bounds_contain_all_outputs_in_the_box(kind: str) -> None:
    """This also tests that the networks can be traced layer by layer."""
    torch.manual_seed(0)
    net = SMALL[kind].build(SHAPE, 5, (0.4, 0.5), 0.3).double()
    net(torch.rand(16, *SHAPE, dtype=torch.float64))  # updates the running statistics
    net.eval()
    box = perturbation_box(torch.rand(2, *SHAPE, dtype=torch.float64), 0.02)
    with torch.no_grad():
        bounds = ibp_bounds(net, box)
        assert bounds.lower.shape == (2, 5)
        for k in range(16):
            fraction = torch.rand_like(box.lower)
            logits = net(torch.lerp(*box, fraction.round() if k % 2 else fraction))
            assert (logits >= bounds.lower - 1e-9).all() and (logits <= bounds.upper + 1e-9).all()


@pytest.mark.parametrize("kind", ["cnn7", "resnext", "dense_net", "wide_resnet"])
def test_ibp_initialization_has_the_right_std(kind: str) -> None:
    """Weights follow N(0, 2 pi / I^2) with I inputs per group; the last layer is unchanged."""
    torch.manual_seed(0)
    net = type(SMALL[kind])(ibp_initialization=True).build(SHAPE, 5)
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert layers[-1].weight.abs().max() <= 1 / math.sqrt(layers[-1].in_features)
    for layer in layers[:-1]:
        inputs = math.prod(layer.weight.shape[1:])
        scaled = layer.weight.detach() * inputs / math.sqrt(2 * math.pi)
        error = 5 / math.sqrt(scaled.numel())  # 5 standard errors of the mean, 7 of the std
        assert abs(scaled.mean()) < error and abs(scaled.std() - 1) < error
    assert any(isinstance(layer, nn.Conv2d) and layer.groups > 1 for layer in layers) == (kind == "resnext")


def test_ibp_initialization_preserves_box_widths() -> None:
    """A linear layer doubles the width, and a ReLU halves it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 400)).eval()
    init_ibp_(net)
    box = perturbation_box(torch.rand(4, 400) * 0.8 + 0.1, 0.1)
    with torch.no_grad():
        lower, upper = ibp_bounds(net[:3].eval(), box)
    assert (upper - lower).mean().item() == pytest.approx(0.2 * 2, rel=0.1)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (ConvNetConfig(size="strided"), 4),
        (ConvNetConfig(size="small"), 10),
        (ConvNetConfig(size="medium"), 16),
        (DenseNetConfig(), 4),
    ],
    ids=lambda value: value.kind if isinstance(value, ReluNetConfig) else None,
)
def test_images_below_the_minimum_size_are_rejected(config: ReluNetConfig, size: int) -> None:
    net = config.build((1, size, size), 3).eval()
    assert net(torch.rand(2, 1, size, size)).shape == (2, 3)
    message = rf"model\.kind={config.kind}.*\(1, {size - 1}, {size}\)"
    if isinstance(config, ConvNetConfig):
        message = rf"model\.kind=conv_net, model\.size={config.size}.*\(1, {size - 1}, {size}\)"
    with pytest.raises(ValueError, match=message):
        config.build((1, size - 1, size), 3)


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(7, 3), (5, 3, 4), (4, 3, 5, 6), (1, 3, 2, 2)]),
    momentum=st.floats(0.01, 1),
)
def test_batch_norm_matches_pytorch(seed: int, shape: tuple[int, ...], momentum: float) -> None:
    """Compare the fused kernel and the explicit statistics in training, then the evaluation mode."""
    torch.manual_seed(seed)
    ours, other = (BatchNorm2d, nn.BatchNorm2d) if len(shape) == 4 else (BatchNorm1d, nn.BatchNorm1d)
    layers = [ours(3, momentum=momentum), ours(3, momentum=momentum), other(3, momentum=momentum)]
    fused, explicit, reference = (layer.double() for layer in layers)
    for layer in (fused, explicit, reference):
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
            layer.bias.copy_(torch.tensor([0.1, 0.2, -0.3]))
    y, upstream = torch.randn(2, *shape, dtype=torch.float64) * 3 + 1
    results = []
    for layer in (fused, explicit, reference):
        y = y.detach().requires_grad_()
        if layer is explicit:
            mean, variance = (part.view(-1, *[1] * (len(shape) - 2)) for part in layer.batch_statistics(y))
            weight, bias = (part.view_as(mean) for part in (layer.weight, layer.bias))
            out = (y - mean) / (variance + layer.eps).sqrt() * weight + bias
        else:
            out = layer(y)
        results.append((out, *torch.autograd.grad((out * upstream).sum(), [y, layer.weight, layer.bias])))
    for layer, result in ((fused, results[0]), (explicit, results[1])):
        torch.testing.assert_close(result, results[2])
        torch.testing.assert_close(dict(layer.named_buffers()), dict(reference.named_buffers()))
    fused.load_state_dict(reference.eval().state_dict())
    fused.eval()
    torch.testing.assert_close(fused(y), reference(y), rtol=0, atol=0)
    assert fused.batch_statistics(y) == (fused.running_mean, fused.running_var)


def test_batch_norm_rejects_one_value_per_channel() -> None:
    layer = BatchNorm1d(3)
    for call in (layer, layer.batch_statistics):
        with pytest.raises(ValueError, match=r"more than 1 value|more than one value"):
            call(torch.rand(1, 3))


@pytest.mark.integration
def test_batch_norm_of_two_workers_matches_one(tmp_path: Path) -> None:
    """Each worker has half of a batch; the halves have different statistics."""
    torch.manual_seed(0)
    y = torch.randn(8, 3, 4, 5, dtype=torch.float64) + torch.arange(8)[:, None, None, None]
    upstream = torch.randn_like(y)
    torch.save((y, upstream), tmp_path / "batch.pt")
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    layer = nn.BatchNorm2d(3).double()
    y.requires_grad_()
    out = layer(y)
    (out * upstream).sum().backward()
    for name, expected in (("out", out.detach()), ("gradient", y.grad)):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), expected)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parts[0][name] + parts[1][name], parameter.grad)
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(parts[0][name], buffer)
        assert torch.equal(parts[0][name], parts[1][name])


WORKER = """
import sys, torch, torch.distributed as dist
from linflab.models.networks.layers import BatchNorm2d
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
y, upstream = (part.chunk(2)[rank] for part in torch.load(f"{folder}/batch.pt", weights_only=True))
layer, y = BatchNorm2d(3).double(), y.clone().requires_grad_()
out = layer(y)
(out * upstream).sum().backward()
gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
torch.save({"out": out.detach(), "gradient": y.grad, **gradients, **dict(layer.named_buffers())}, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""
