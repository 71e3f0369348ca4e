"""Networks as users write them, one for each idiom, for images (B, 2, 6, 6) and 4 classes."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import Normalize

SHAPE, CLASSES = (2, 6, 6), 4


class Own(nn.Module):
    """A network that applies `preprocess`, a convolution and operations in `body`, and a linear layer."""

    def __init__(self, body: Callable[["Own", Tensor], Tensor], preprocess: Callable[["Own", Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.preprocess = body, preprocess
        self.conv, self.second_conv = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.conv1d = nn.ReLU(inplace=True), nn.Conv1d(4, 4, 3, stride=2)
        self.matrix = nn.Parameter(torch.randn(6, 3) / 3)
        self.gain = nn.Parameter(torch.randn(4, 1, 1))
        self.register_buffer("mean", torch.rand(1, 2, 1, 1))
        self.register_buffer("std", torch.rand(1, 2, 1, 1) + 0.2)
        self.register_buffer("mask", torch.rand(6, 6) - 0.3)
        self.last = nn.LazyLinear(CLASSES)

    def forward(self, images: Tensor, scale: float = 1.0, return_features: bool = False) -> Tensor:
        features = self.body(self, self.preprocess(self, images))
        return self.last(features.flatten(1)) * scale


def _modify_sum_in_place(net: Own, x: Tensor) -> Tensor:
    x = net.conv(x)
    y = net.second_conv(x.relu())
    y += x
    y *= 0.5
    return functional.relu_(y)


def _modify_view_in_place(net: Own, x: Tensor) -> Tensor:
    x = net.conv(x)
    y = x.view(len(x), -1)
    y.sub_(0.1).relu_()
    return y


def _reuse_after_in_place(net: Own, x: Tensor) -> Tensor:
    x = net.conv(x)
    y = net.relu(x)  # overwrites x
    return x + net.second_conv(y).relu()


def _split_and_concatenate(net: Own, x: Tensor) -> Tensor:
    left, right = net.conv(x).chunk(2, dim=1)
    return torch.cat([right.relu(), left - right, torch.tanh(left)[:, :, ::2, ::2].repeat(1, 1, 2, 2)], 1)


def _apply_to_conv(function: Callable[[Tensor], Tensor]) -> Callable[[Own, Tensor], Tensor]:
    return lambda net, x: function(net.conv(x))


def _identity(net: Own, x: Tensor) -> Tensor:
    return x


BODIES: dict[str, Callable[[Own, Tensor], Tensor]] = {
    "view": lambda net, x: net.conv(x).relu().view(x.size(0), -1),
    "shape": lambda net, x: torch.relu(net.conv(x)).reshape(x.shape[0], -1),
    "len": lambda net, x: functional.relu(net.conv(x)).reshape(len(x), -1),
    "unpacked shape": lambda net, x: (lambda b, c, h, w: net.conv(x).relu().view(b, h * w * 4))(*x.shape),
    "flatten": _apply_to_conv(lambda x: torch.flatten(x.relu(), 1)),
    "max pooling": _apply_to_conv(lambda x: functional.max_pool2d(functional.relu(x), 2)),
    "overlapping max pooling": _apply_to_conv(lambda x: functional.relu(functional.max_pool2d(x, 3, 2, 1))),
    "max pooling twice": lambda net, x: functional.max_pool2d(
        net.second_conv(functional.max_pool2d(net.conv(x), 2)), 2
    ),
    "ceiled max pooling": _apply_to_conv(lambda x: functional.max_pool2d(x, 4, ceil_mode=True).relu()),
    "uneven adaptive max pooling": _apply_to_conv(lambda x: functional.adaptive_max_pool2d(x.relu(), (4, 5))),
    "uneven adaptive average pooling": _apply_to_conv(lambda x: functional.adaptive_avg_pool2d(x.relu(), (4, 9))),
    "averages inside the map": _apply_to_conv(lambda x: functional.avg_pool2d(x.relu(), 4, 3, 1, True, False)),
    "averages with ceiled windows": _apply_to_conv(
        lambda x: functional.avg_pool1d(x.relu().flatten(2), 5, 4, 2, ceil_mode=True)
    ),
    "largest over rows": _apply_to_conv(lambda x: x.relu().amax(2)),
    "largest over channels": _apply_to_conv(lambda x: torch.max(x, 1, keepdim=True).values.expand(-1, 4, -1, -1) + x),
    "smallest over maps": _apply_to_conv(lambda x: x.relu() + x.amin((2, 3), keepdim=True).repeat(1, 1, 6, 6)),
    "smallest over columns": _apply_to_conv(lambda x: x.min(dim=-1)[0].relu()),
    "magnitude": _apply_to_conv(lambda x: x.abs()),
    "reflected": lambda net, x: net.second_conv(
        functional.pad(functional.interpolate(net.conv(x), scale_factor=2), (1,) * 4, "reflect")
    ).relu(),
    "average pooling": _apply_to_conv(lambda x: functional.avg_pool2d(x.relu(), 2)),
    "global average": _apply_to_conv(lambda x: functional.adaptive_avg_pool2d(x.relu(), 1).squeeze()),
    "mean": _apply_to_conv(lambda x: x.relu().mean((2, 3))),
    "mean of channels": _apply_to_conv(lambda x: x.relu().mean(1, keepdim=True)),
    "mean of columns": _apply_to_conv(lambda x: x.relu().mean(dim=-1)),
    "dropout": lambda net, x: functional.dropout(net.conv(x).relu(), 0.5, training=net.training),
    "branches": lambda net, x: net.conv(x).relu() - net.second_conv(net.conv(x)),
    "shortcut": lambda net, x: net.second_conv(net.conv(x).relu()) + net.conv(x),
    "gain": lambda net, x: net.conv(x).relu() * net.gain,
    "mask": lambda net, x: (net.mask * net.conv(x)).relu(),
    "reused": lambda net, x: net.second_conv(net.second_conv(net.conv(x).relu()).relu()),
    "in place": lambda net, x: net.relu(net.second_conv(net.relu(net.conv(x)))),
    "in place on a sum": _modify_sum_in_place,
    "in place on a view": _modify_view_in_place,
    "used again after in place": _reuse_after_in_place,
    "split": _split_and_concatenate,
    "permuted": _apply_to_conv(lambda x: x.permute(0, 2, 3, 1).relu().transpose(1, 2)),
    "padded": lambda net, x: net.second_conv(
        functional.pad(nn.ZeroPad2d((1, 0, 2, 1))(net.conv(x).relu()), (0, 1))
    ).relu(),
    "unflattened": _apply_to_conv(lambda x: functional.avg_pool2d(x.relu().flatten(1).unflatten(1, (2, 12, 6)), 2)),
    "one dimension": lambda net, x: net.conv1d(net.conv(x).flatten(2)).relu(),
    "pooled in one dimension": _apply_to_conv(
        lambda x: functional.avg_pool1d(functional.max_pool1d(x.relu().flatten(2), 2), 3)
    ),
    "matrix": lambda net, x: (net.conv(x).relu() @ net.matrix).relu(),
    "functional layers": lambda net, x: functional.linear(
        functional.conv2d(net.conv(x).relu(), net.second_conv.weight * 2, stride=2), net.matrix[:2].T
    ),
    "clamped": _apply_to_conv(lambda x: torch.cat([x.clamp(-0.2, 0.3), functional.relu6(4 * x), x.clamp(min=0.1)], 1)),
    "sigmoid": _apply_to_conv(torch.sigmoid),
    "SiLU": _apply_to_conv(functional.silu),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "dilated max pooling": lambda: nn.MaxPool2d(2, stride=1, padding=1, dilation=3, ceil_mode=True),
    "adaptive max pooling": lambda: nn.AdaptiveMaxPool2d(2),
    "adaptive average pooling": lambda: nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d((3, None))),
    "dropout of maps": lambda: nn.Sequential(nn.ReLU(), nn.Dropout2d()),
    "batch normalization": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()),
    "grouped convolution": lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 2, 2, groups=2), nn.ReLU()),
    "average pooling with a divisor": lambda: nn.Sequential(nn.ReLU(), nn.AvgPool2d(3, 2, 1, True, True, 7)),
    "same padding": lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, (3, 5), padding="same"), nn.ReLU()),
    "circular padding": lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular")),
    "leaky ReLU": lambda: nn.LeakyReLU(0.2),
    "tanh": lambda: nn.Tanh(),
    "ELU": lambda: nn.ELU(),
    "softplus": lambda: nn.Softplus(),
    "GELU": lambda: nn.GELU(),
}
PREPROCESSING: dict[str, Callable[[Own, Tensor], Tensor]] = {
    "none": _identity,
    "numbers": lambda net, x: (x - 0.13) / 0.31,
    "buffers": lambda net, x: (x - net.mean) / net.std,
    "minus": lambda net, x: 2 * (1 - x) - (-x),
    "in place": lambda net, x: x.clone().sub_(net.mean).div_(net.std),
    "integers": lambda net, x: (x - torch.ones(6, dtype=torch.uint8)) * (torch.arange(6) > 1) / torch.tensor(3),
    "as another": lambda net, x: (x - net.mean.to(x)) / net.std.type_as(x).view(1, 2, 1, 1),
    "new tensor": lambda net, x: x - x.new_tensor([0.4, 0.5]).view(-1, 1, 1) + torch.zeros_like(x[0]),
    "torchvision": lambda net, x: Normalize((0.4, 0.5), (0.2, 0.3))(x),
    "tensor": lambda net, x: x.sub(torch.tensor([0.4, 0.5], dtype=x.dtype).view(-1, 1, 1)).mul(math.pi),
}
IDIOMS = [
    *((name, "none") for name in (*BODIES, *LAYERS)),
    *(("flatten", name) for name in PREPROCESSING if name != "none"),
]


def build_own_network(body: str, preprocess: str = "none", seed: int = 0) -> Own:
    """Return a network in float32 and evaluation mode, with running statistics of random images."""
    torch.manual_seed(seed)
    net = Own(BODIES.get(body, lambda net, x: net.inner(net.conv(x))), PREPROCESSING[preprocess])
    if body in LAYERS:
        net.inner = LAYERS[body]()
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(16, *SHAPE))
    return net.eval()
