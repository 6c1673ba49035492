"""Libraries that build on ResNets: what ``accelerate`` fuses in each, and whether its results are the stock model's.

    python -m resnet_fast.benchmarks.clients [NAME ...]

prints the table of docs/clients.md. Models are small, have random weights, and come from the libraries that are
installed here. Each is compared with its stock copy in float64: outputs on the fastest backend, gradients on the
reference.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast import numerics

from .markdown import RIGHT, table


class Client(NamedTuple):
    """A model of a library.

    Attributes:
        name: for the table.
        package: its distribution, for the version.
        build: makes the model.
        run: calls it with an image (1, 3, size, size) and returns the tensors to compare.
        size: of the image; small, because convolutions in float64 are slow.
    """

    name: str
    package: str
    build: Callable[[], nn.Module]
    run: Callable[[Any, Tensor], list[Tensor]]
    size: int = 32


class Outcome(NamedTuple):
    """What :func:`check` found about a client.

    Attributes:
        report: what is fused.
        error: of the outputs, relative to float64, in units of the stock model's own error in float32.
        gradient_error: the same of the gradients.
    """

    report: resnet_fast.ModelReport
    error: float
    gradient_error: float


def _of(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _features(m: Any, x: Tensor) -> list[Tensor]:
    """Return a detector's features: its boxes depend on comparisons, which rounding may turn."""
    return list(m.backbone(x).values())


def _detector(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    kwargs = {"weights": None, "weights_backbone": None, "num_classes": 3} | kwargs
    return lambda: _of("torchvision.models.detection", name)(**kwargs)


def _segmenter(name: str) -> Callable[[], nn.Module]:
    return lambda: _of("torchvision.models.segmentation", name)(weights=None, weights_backbone=None, num_classes=3)


def _segmentation(m: Any, x: Tensor) -> list[Tensor]:
    return [m(x)["out"]]


def _output(m: Any, x: Tensor) -> list[Tensor]:
    return [m(x)]


_SMALL = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5,
}  # fmt: skip
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [2, 1, 1, 1], "layer_type": "bottleneck"}


def _timm_backbone() -> Any:
    kwargs = {"out_indices": [1, 2, 3, 4], "use_pretrained_backbone": False, "features_only": True}
    return _of("transformers", "TimmBackboneConfig")(backbone="resnet18", **kwargs)


def _transformer(name: str, head: str = "ForObjectDetection", **kwargs: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = _of("transformers", f"{name}Config")(backbone_config=_timm_backbone(), **(_SMALL | kwargs))
        return _of("transformers", name + head)(config)

    return build


def _rt_detr(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        stages = ["stage2", "stage3", "stage4"]
        backbone = _of("transformers", "RTDetrResNetConfig")(**_RESNET, out_features=stages)
        config = _of("transformers", f"{name}Config")(
            backbone_config=backbone, encoder_hidden_dim=32, encoder_in_channels=[32, 64, 64], d_model=32,
            decoder_in_channels=[32, 32, 32], encoder_ffn_dim=32, decoder_ffn_dim=32, decoder_layers=2, num_queries=5,
            encoder_attention_heads=2, decoder_attention_heads=2, num_denoising=0, feat_strides=[8, 16, 32],
        )  # fmt: skip
        return _of("transformers", f"{name}ForObjectDetection")(config)

    return build


def _mask_former() -> nn.Module:
    backbone = _of("transformers", "ResNetConfig")(**_RESNET, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = _of("transformers", "MaskFormerConfig")(
        backbone_config=backbone,
        decoder_config=_of("transformers", "DetrConfig")(backbone_config=_timm_backbone(), **_SMALL),
        fpn_feature_size=32,
        mask_feature_size=32,
    )
    return _of("transformers", "MaskFormerForInstanceSegmentation")(config)


def _uper_net() -> nn.Module:
    backbone = _of("transformers", "ResNetConfig")(**_RESNET, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = _of("transformers", "UperNetConfig")(
        backbone_config=backbone, hidden_size=32, pool_scales=[1, 2], auxiliary_in_channels=64, auxiliary_channels=16
    )
    return _of("transformers", "UperNetForSemanticSegmentation")(config)


def _boxes(m: Any, x: Tensor) -> list[Tensor]:
    out = m(pixel_values=x)
    return [out.logits, out.pred_boxes]


def _backbone_of_rt_detr(m: Any, x: Tensor) -> list[Tensor]:
    """Return its features: RT-DETR chooses its queries by comparing scores, which rounding may turn."""
    mask = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool)
    return [features for features, _ in m.model.backbone(x, mask)]


def _smp(name: str, encoder: str) -> Callable[[], nn.Module]:
    return lambda: _of("segmentation_models_pytorch", name)(encoder, encoder_weights=None, classes=2)


def _act() -> nn.Module:
    """LeRobot's ACT encodes each camera by torchvision's ResNet-18 with frozen norms, up to its last stage."""
    net = _of("torchvision.models", "resnet18")(norm_layer=_of("torchvision.ops.misc", "FrozenBatchNorm2d"))
    return _of("torchvision.models._utils", "IntermediateLayerGetter")(net, return_layers={"layer4": "feature_map"})


def _diffusion() -> nn.Module:
    """LeRobot's diffusion policy and VQ-BeT encode images by torchvision's ResNet-18 without pooling and head."""
    return nn.Sequential(*list(_of("torchvision.models", "resnet18")().children())[:-2])


CLIENTS = (
    Client("Faster R-CNN ResNet-50 FPN", "torchvision", _detector("fasterrcnn_resnet50_fpn"), _features),
    Client("RetinaNet ResNet-50 FPN", "torchvision", _detector("retinanet_resnet50_fpn"), _features),
    Client("FCOS ResNet-50 FPN", "torchvision", _detector("fcos_resnet50_fpn"), _features),
    Client("Mask R-CNN ResNet-50 FPN", "torchvision", _detector("maskrcnn_resnet50_fpn"), _features),
    Client("Keypoint R-CNN ResNet-50 FPN", "torchvision", _detector("keypointrcnn_resnet50_fpn"), _features),
    Client("FCN ResNet-50", "torchvision", _segmenter("fcn_resnet50"), _segmentation),
    Client("DeepLabV3 ResNet-50", "torchvision", _segmenter("deeplabv3_resnet50"), _segmentation),
    Client("DETR, timm ResNet-18", "transformers", _transformer("Detr"), _boxes),
    Client("Conditional DETR, timm ResNet-18", "transformers", _transformer("ConditionalDetr"), _boxes),
    Client(
        "Deformable DETR, timm ResNet-18",
        "transformers",
        _transformer("DeformableDetr", with_box_refine=True),
        _boxes,
        64,
    ),
    Client("Table Transformer, timm ResNet-18", "transformers", _transformer("TableTransformer"), _boxes),
    Client(
        "ResNetForImageClassification",
        "transformers",
        lambda: _of("transformers", "ResNetForImageClassification")(_of("transformers", "ResNetConfig")(**_RESNET)),
        lambda m, x: [m(x).logits],
    ),
    Client("RT-DETR, ResNet-D", "transformers", _rt_detr("RTDetr"), _backbone_of_rt_detr),
    Client("RT-DETRv2, ResNet-D", "transformers", _rt_detr("RTDetrV2"), _backbone_of_rt_detr),
    Client("MaskFormer, ResNet", "transformers", _mask_former, lambda m, x: [m(x).masks_queries_logits], 64),
    Client("UperNet, ResNet", "transformers", _uper_net, lambda m, x: [m(x).logits], 64),
    Client("Unet, resnet34", "segmentation_models_pytorch", _smp("Unet", "resnet34"), _output),
    Client("DeepLabV3Plus, resnet18", "segmentation_models_pytorch", _smp("DeepLabV3Plus", "resnet18"), _output),
    Client("Unet, tu-resnet26d", "segmentation_models_pytorch", _smp("Unet", "tu-resnet26d"), _output),
    Client("Unet, se_resnet50", "segmentation_models_pytorch", _smp("Unet", "se_resnet50"), _output),
    Client("ResNet-26-D", "timm", lambda: _of("timm", "create_model")("resnet26d"), _output),
    Client("SE-ResNet-18", "timm", lambda: _of("timm", "create_model")("seresnet18"), _output),
    Client("SE-ResNet-50-T", "timm", lambda: _of("timm", "create_model")("seresnet50t"), _output),
    Client("ResNet-18 with blur", "timm", lambda: _of("timm", "create_model")("resnetblur18"), _output),
    Client("ACT's image encoder", "lerobot", _act, lambda m, x: [m(x)["feature_map"]]),
    Client("Diffusion Policy's and VQ-BeT's image encoder", "lerobot", _diffusion, _output),
)


def randomize(model: nn.Module) -> None:
    """Give norms parameters and statistics as after training: a fresh norm (1, 0, 0, 1) hides mistakes."""
    m: Any
    for m in model.modules():
        if isinstance(getattr(m, "running_var", None), Tensor):
            for tensor, centre in ((m.weight, 1.0), (m.bias, 0.0), (m.running_mean, 0.0), (m.running_var, 1.0)):
                with torch.no_grad():
                    tensor.copy_(centre + 0.4 * (torch.rand_like(tensor) - 0.5))


def check(client: Client) -> Outcome:
    """Compare a client with its accelerated copy.

    Raises:
        AssertionError: an output or a gradient is over its error budget (:mod:`resnet_fast.numerics`).
    """
    torch.manual_seed(0)
    stock = client.build().eval()
    randomize(stock)
    exact = copy.deepcopy(stock).double()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.randn(1, 3, client.size, client.size)
    with torch.no_grad():
        got = client.run(fused, x)
    want, exactly = _with_gradients(client, stock, x), _with_gradients(client, exact, x.double())
    with resnet_fast.use_backend("reference"):
        trained = _with_gradients(client, fused, x)
    # the sum over all layers' products, along which errors walk at random
    k = 4608 * sum(isinstance(m, nn.Conv2d) for m in stock.modules())
    error = _compare(got, exactly[0], want[0], k)
    return Outcome(resnet_fast.report(fused), error, _compare(trained[1], exactly[1], want[1], k))


def _with_gradients(client: Client, model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs and the gradients of the convolutions' weights, in eval mode, where nothing is random."""
    out = client.run(model, x)
    sum([t.square().mean() for t in out]).backward()  # type: ignore[union-attr]
    convs = [m.weight.grad for m in model.modules() if isinstance(m, nn.Conv2d)]
    return [t.detach() for t in out], [t for t in convs if t is not None]


def _compare(got: list[Tensor], exact: list[Tensor], stock: list[Tensor], k: int) -> float:
    """Assert that every tensor is within its budget; return the worst error in units of eager's."""
    assert len(got) == len(exact) == len(stock) > 0
    worst = 0.0
    for out, ref, eager in zip(got, exact, stock, strict=True):
        found = numerics.assert_close(out, ref, eager, k)
        worst = max(worst, found.rel / found.eager_rel if found.eager_rel else 0.0)
    return worst


def _row(client: Client, report: resnet_fast.ModelReport) -> list[str]:
    """Return a client's line of the table."""
    left = [row for row in report.rows if row.fused < row.convs]
    outside = dict.fromkeys(row.kind.rpartition(".")[2] for row in left if row.reason.startswith("outside"))
    reasons = [f"layers of {', '.join(outside)}"] if outside else []
    reasons += dict.fromkeys(row.reason for row in left if not row.reason.startswith("outside"))
    return [
        client.name,
        f"{client.package} {metadata.version(client.package)}",
        ", ".join(sorted({row.op for row in report.rows if row.fused})),
        f"{report.fused} of {report.convs}",
        "; ".join(reasons),
    ]


def main(names: list[str]) -> None:
    """Print the table for the clients whose name contains one of ``names``, or for all."""
    rows = []
    for client in CLIENTS:
        if not names or any(name.lower() in client.name.lower() for name in names):
            rows.append(_row(client, check(client).report))
            print(client.name, rows[-1][3], file=sys.stderr, flush=True)
    print(
        table(
            ["client", "package", "fused as", "convolutions fused", "not fused"],
            rows,
            ["---", "---", "---", RIGHT, "---"],
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
