"""Families of timm without attention, small, in float64, with random weights and statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.shared.architectures import randomized


@dataclass(frozen=True)
class Timm:
    """A classifier of timm.

    Attributes
    ----------
    name : str
        Of `timm.create_model`.
    size : int
        Height and width of the input.
    keywords : dict
        For `timm.create_model`, such as fewer layers.
    """

    name: str
    size: int = 32
    keywords: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def build(self, seed: int = 0) -> nn.Module:
        """Model of 10 classes in float64 and evaluation mode."""
        import timm

        model: nn.Module = timm.create_model(self.name, num_classes=10, **self.keywords)
        return randomized(model.double(), seed).eval()

    def images(self, n: int = 1) -> Tensor:
        """Tensor of shape (n, 3, size, size), within -3 and 3."""
        generator = torch.Generator().manual_seed(len(self.name))
        return torch.randn(n, 3, self.size, self.size, dtype=torch.float64, generator=generator).clamp(-3, 3)


SHORT = {"layers": (1, 1, 1, 1)}
#: One or more of each family, and what is particular about it.
TIMM = [
    # residual nets: deep stem, anti-aliasing, squeeze and excitation, efficient channel attention, selective kernels
    Timm("resnet10t"),
    Timm("resnetblur18", keywords=SHORT),
    Timm("resnetaa34d", keywords=SHORT),
    Timm("ecaresnet26t", keywords=SHORT),
    Timm("seresnext26t_32x4d", keywords=SHORT),
    Timm("legacy_seresnet18"),
    Timm("skresnet18", keywords=SHORT),
    Timm("skresnext50_32x4d", keywords=SHORT),
    Timm("resnest14d"),
    Timm("res2net50_14w_8s", keywords=SHORT),
    Timm("res2next50", keywords=SHORT),
    # norms first; standardised weights; group norm, norms with activations
    Timm("resnetv2_18", keywords=SHORT),
    Timm("resnetv2_50d_gn", keywords=SHORT),
    Timm("resnetv2_50d_evos", keywords=SHORT),
    Timm("resnetv2_50d_frn", keywords=SHORT),
    Timm("resnetv2_50x1_bit"),
    # without norms, scaled standardised weights
    Timm("test_nfnet"),
    Timm("nf_resnet26"),
    Timm("nf_ecaresnet26"),
    Timm("nf_regnet_b0"),
    # nets of blocks
    Timm("test_byobnet"),
    Timm("gernet_s"),
    Timm("repvgg_a0"),
    Timm("regnetx_002"),
    Timm("regnety_002"),
    Timm("regnetz_b16"),
    # mobile nets: depthwise convolutions, padding as TensorFlow does it, hard activations, mixed kernels
    Timm("test_efficientnet"),
    Timm("test_efficientnet_gn"),
    Timm("test_efficientnet_ln"),
    Timm("test_efficientnet_evos"),
    Timm("efficientnet_lite0"),
    Timm("mixnet_s"),
    Timm("tf_mixnet_s"),
    Timm("tinynet_e"),
    Timm("mobilenetv2_035"),
    Timm("mnasnet_small"),
    Timm("mobilenetv4_conv_small_035"),
    Timm("mobilenetv3_small_050"),
    Timm("tf_mobilenetv3_small_minimal_100"),
    Timm("lcnet_035"),
    Timm("lcnetv2_small"),
    Timm("rexnet_100"),
    Timm("ghostnet_050"),
    Timm("repghostnet_050"),
    Timm("hgnetv2_b0"),
    Timm("fasternet_t0"),
    Timm("fastvit_t8"),
    Timm("starnet_s050"),
    # layer norm, root mean square norm, global response norm; gates; pooling in place of attention; mixers
    Timm("convnext_atto"),
    Timm("convnext_atto_rms"),
    Timm("convnextv2_atto"),
    Timm("test_convnext3"),
    Timm("inception_next_atto"),
    Timm("test_mambaout"),
    Timm("poolformer_s12"),
    Timm("poolformerv2_s12"),
    Timm("gmlp_ti16_224", keywords={"img_size": 32}),
    Timm("mixer_s16_224", keywords={"img_size": 32}),
    Timm("resmlp_12_224", keywords={"img_size": 32}),
    Timm("gmixer_12_224", keywords={"img_size": 32}),
    # several branches
    Timm("densenetblur121d", keywords={"block_config": (2, 2, 2, 2)}),
    Timm("dla46_c"),
    Timm("dpn48b"),
    Timm("hrnet_w18_small"),
    Timm("selecsls42"),
    Timm("ese_vovnet19b_slim_dw"),
    Timm("cs3darknet_s"),
    Timm("cspnext_tiny"),
]
#: More of them, of which each takes a second or more.
LARGE = [
    Timm("convformer_s18"),
    Timm("convmixer_768_32"),
    Timm("focalnet_tiny_srf"),
    Timm("rdnet_tiny"),
    Timm("tresnet_m"),
    Timm("eca_vovnet39b"),
    Timm("cspresnet50"),
    Timm("darknet17"),
    Timm("eca_nfnet_l0"),
    Timm("regnetv_040"),
    Timm("mobileone_s0"),
    Timm("repvit_m0_9"),
    Timm("inception_v4", 75),
    Timm("inception_resnet_v2", 75),
    Timm("xception41"),
    Timm("legacy_xception", 75),
    Timm("dm_nfnet_f0"),
    Timm("pnasnet5large", 64),
]
