"""Six experiments of He et al. (2015): the question, the nets, what the paper reports, and two protocols for each.

``full`` is the paper's protocol, which needs its data and GPUs. ``reduced`` trains on Fashion-MNIST and takes about an
hour on two CPU cores. Experiments share runs: ``degradation``, ``depth`` and ``responses`` use the same nets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import UserError
from .. import recipe as recipes
from ..recipe import Recipe

PROTOCOLS = ("reduced", "full")


@dataclass(frozen=True)
class Case:
    """One run: a net, its shortcut option (None: the paper's usual one), and what differs from the family's recipe.

    ``paper`` is the error that the paper reports for it, in per cent, and ``source`` where.
    """

    label: str
    net: str
    shortcut: str | None = None
    paper: float | None = None
    source: str = ""
    reduced: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cifar(self) -> bool:
        return self.net.startswith("cifar_")

    @property
    def key(self) -> str:
        """The name of the run's folder. A run that two experiments use has one key."""
        return self.net if self.shortcut is None else f"{self.net}-{self.shortcut}"

    def recipe(self, protocol: str, data_path: str | None, seed: int, changes: Mapping[str, Any]) -> Recipe:
        """Return the recipe of the case: the family's file, this net, the case's own differences, then ``changes``."""
        values: dict[str, Any] = {"model": self.net, "seed": seed, "shortcut": self.shortcut}
        family = "cifar" if self.cifar else "imagenet"
        if protocol == "reduced":
            source = f"reduced-{family}"
            values |= self.reduced
        else:
            deep = self.net in ("cifar_resnet110", "cifar_resnet1202", "cifar_plain110")
            source = f"{family}-paper-110" if deep else f"{family}-paper"
            if not self.net.startswith("resnet50"):
                values["stride_in_1x1"] = False  # the two-layer blocks have no 1x1
        if data_path is not None:
            values["data_path"] = data_path
        return recipes.load_recipe(source, values | dict(changes))


@dataclass(frozen=True)
class Experiment:
    """A question, what the paper found, and the runs that answer it. ``name`` is also a function in ``verdicts``."""

    name: str
    title: str
    question: str
    found: str
    cases: tuple[Case, ...]
    source: str


TABLE_2 = "Table 2, top-1 on ImageNet"
TABLE_3 = "Table 3, top-1 on ImageNet"
TABLE_6 = "Table 6, test error on CIFAR-10"

_SHORT: Mapping[str, Any] = {
    "epochs": None,
    "steps": 240,
    "milestones": [],
    "schedule": "constant",
    "warmup": 0,
    "lr": 0.002,
}
"""1202 layers cost as much as sixty 20-layer nets, hence 240 steps. The rate is that of a warm-up, like the paper's for
110 layers: at 0.05, after 80 steps of 0.005, the loss jumped to 62."""

PLAIN_20 = Case("plain-20", "cifar_plain20", source="Figure 1")
PLAIN_56 = Case("plain-56", "cifar_plain56", source="Figure 1")
RESNET_20 = Case("resnet-20", "cifar_resnet20", paper=8.75, source=TABLE_6)
RESNET_32 = Case("resnet-32", "cifar_resnet32", paper=7.51, source=TABLE_6)
RESNET_44 = Case("resnet-44", "cifar_resnet44", paper=7.17, source=TABLE_6)
RESNET_56 = Case("resnet-56", "cifar_resnet56", paper=6.97, source=TABLE_6)
RESNET_110 = Case("resnet-110", "cifar_resnet110", paper=6.43, source=TABLE_6)
RESNET_1202 = Case("resnet-1202", "cifar_resnet1202", paper=7.93, source=TABLE_6, reduced=_SHORT)
PLAIN_18 = Case("plain-18", "plain18", paper=27.94, source=TABLE_2)
PLAIN_34 = Case("plain-34", "plain34", paper=28.54, source=TABLE_2)
RESNET_18 = Case("resnet-18", "resnet18", "A", 27.88, TABLE_2)
RESNET_34 = Case("resnet-34", "resnet34", "A", 25.03, TABLE_2)
RESNET_50 = Case("resnet-50", "resnet50", "B", 22.85, TABLE_3)

EXPERIMENTS = (
    Experiment(
        "degradation",
        "Degradation: deeper plain nets train worse, deeper residual nets do not",
        "Is the training error of a deeper net higher, although a copy of the shallower one followed by identities "
        "would do as well?",
        "Plain-56 has a higher training error than plain-20 throughout (Figure 1), plain-34 than plain-18 (Figure 4, "
        "left); with shortcuts the deeper net is the better one (Figure 4, right, and Figure 6, middle).",
        (PLAIN_20, PLAIN_56, RESNET_20, RESNET_56, PLAIN_18, PLAIN_34, RESNET_18, RESNET_34),
        "sections 1, 4.1 and 4.2",
    ),
    Experiment(
        "depth",
        "Depth: residual nets of 20 to 1202 layers",
        "Do residual nets go on gaining from depth, and can 1202 layers be optimized at all?",
        "The error falls from 8.75 % at 20 layers to 6.43 % at 110; 1202 layers show no optimization difficulty "
        "(training error below 0.1 %) and a test error of 7.93 %, which the paper puts down to overfitting.",
        (RESNET_20, RESNET_32, RESNET_44, RESNET_56, RESNET_110, RESNET_1202),
        "section 4.2, Table 6 and Figure 6",
    ),
    Experiment(
        "bottleneck",
        "Bottlenecks: more layers for the same multiply-adds",
        "What does a block of 1x1, 3x3, 1x1 give in place of two 3x3 at equal cost?",
        "Replacing each two-layer block of the 34-layer net by a bottleneck gives 50 layers at 3.8 instead of 3.6 "
        "billion multiply-adds, and 22.85 % instead of 25.03 % error.",
        (RESNET_34, RESNET_50),
        "section 4.1, Tables 1 and 3",
    ),
    Experiment(
        "shortcuts",
        "Shortcuts: identity with zeros (A), projections where the size changes (B), projections everywhere (C)",
        "Are projections needed to address degradation?",
        "B is slightly better than A and C slightly better than B (25.03, 24.52, 24.19 % for 34 layers): the "
        "differences are small, so projections are not essential.",
        (
            RESNET_20,
            Case("resnet-20, B", "cifar_resnet20", "B", source=TABLE_3),
            Case("resnet-20, C", "cifar_resnet20", "C", source=TABLE_3),
        ),
        "section 4.1, Table 3",
    ),
    Experiment(
        "responses",
        "Layer responses: how strongly a layer changes the signal",
        "How large is the standard deviation of each 3x3 layer's output, after BatchNorm, before ReLU and addition?",
        "Residual nets have generally smaller responses than plain ones, and the deeper a residual net, the smaller "
        "the responses of its layers (Figure 7).",
        (PLAIN_20, PLAIN_56, RESNET_20, RESNET_56, RESNET_110),
        "section 4.2, Figure 7",
    ),
    Experiment(
        "flops",
        "Cost: multiply-adds compared with VGG and GoogLeNet",
        "What does depth cost?",
        "The 34-layer nets need 3.6 billion multiply-adds, 18 % of VGG-19's 19.6 billion; even 152 layers need 11.3, "
        "less than VGG-16 and VGG-19 (15.3 and 19.6).",
        (),
        "sections 3.3 and 4.1, Table 1",
    ),
)


def experiment(name: str) -> Experiment:
    """Return the experiment of that name. Raises UserError if there is none."""
    for one in EXPERIMENTS:
        if one.name == name:
            return one
    known = ", ".join(e.name for e in EXPERIMENTS)
    raise UserError(f"an experiment among {known}, or all", repr(name), "correct the name")
