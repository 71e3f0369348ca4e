"""Networks and their settings, which importing this package registers."""

from linflab.models.networks.base import NetworkConfig
from linflab.models.networks.convnets import CNN7Config, ConvNetConfig, DenseNetConfig, ResNeXtConfig, WideResNetConfig
from linflab.models.networks.cost import count_flops, count_parameters
from linflab.models.networks.ensemble import Ensemble, EnsembleConfig, LipschitzEnsemble
from linflab.models.networks.group_sort import GroupSortConfig, GroupSortNet
from linflab.models.networks.hybrid import LinfDistHybrid, LinfDistHybridConfig
from linflab.models.networks.layers import (
    GroupSort,
    L1ProjectedLinear,
    LpDistance,
    LpDistanceConv2d,
    MeanShift,
    Normalize,
    ScaledLinear,
    SortDistance,
)
from linflab.models.networks.linf_dist import LinfDistConvNetConfig, LinfDistMLPConfig, LinfDistNet
from linflab.models.networks.nearest import LinfNearestConfig
from linflab.models.networks.sort_net import SortNetConfig

__all__ = [
    "CNN7Config",
    "ConvNetConfig",
    "DenseNetConfig",
    "Ensemble",
    "EnsembleConfig",
    "GroupSort",
    "GroupSortConfig",
    "GroupSortNet",
    "L1ProjectedLinear",
    "LinfDistConvNetConfig",
    "LinfDistHybrid",
    "LinfDistHybridConfig",
    "LinfDistMLPConfig",
    "LinfDistNet",
    "LinfNearestConfig",
    "LipschitzEnsemble",
    "LpDistance",
    "LpDistanceConv2d",
    "MeanShift",
    "NetworkConfig",
    "Normalize",
    "ResNeXtConfig",
    "ScaledLinear",
    "SortDistance",
    "SortNetConfig",
    "WideResNetConfig",
    "count_flops",
    "count_parameters",
]
