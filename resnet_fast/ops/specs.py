"""Make the Spec of a call. A call is checked once per shape; after that its Spec is looked up."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from .. import float32, invariance
from ..calls import Call, NetCall
from ..spec import NetSpec, Spec
from .check import LayerInput, check_x
from .op import OPS

_facts = attrgetter("shape", "dtype", "device")  # a C function: it reads every tensor of every call

_KEEP = 4096
_specs: dict[Any, Spec | NetSpec] = {}
_equal: dict[Spec | NetSpec, Spec | NetSpec] = {}


def spec_of(call: Call | NetCall, grad: bool) -> Any:
    """Check a call and return its Spec. Calls of a shape that was seen before cost one dictionary look-up.

    Equal specs are one object, so that whoever looks something up by a spec compares identities.
    """
    key = key_of(call, grad)
    spec = _specs.get(key)
    if spec is None:
        spec = check(call, grad)
        if len(_specs) >= _KEEP:
            _specs.clear()
            _equal.clear()
        spec = _specs[key] = _equal.setdefault(spec, spec)
    return spec


def forget() -> None:
    """Check the next call of every shape again."""
    _specs.clear()
    _equal.clear()


def key_of(call: Call | NetCall, grad: bool) -> tuple[Any, ...]:
    """Return all that :func:`check` looks at: shapes, strides, dtypes, devices, the numbers of the call, and flags."""
    x = call.x
    switches = grad, float32.products_are_tf32(), invariance.is_on()
    key: list[Any] = [switches, x.shape, x.dtype, x.device, x.stride(), call.numbers()]
    for part in call.parts:
        for conv in part.convs:
            weight, bias = conv[:2]
            key += _facts(weight)
            key.append(weight.stride())
            if bias is None:
                key.append(None)
            else:
                key += _facts(bias)
        for norm in part.norms:
            for t in norm[:4]:
                if t is None:
                    key.append(None)
                else:
                    key += _facts(t)
    return tuple(key)


def check(call: Call | NetCall, grad: bool = False) -> Any:
    """Return the Spec of a call. UserError where the call makes no sense."""
    at = LayerInput.of(call.x)
    check_x(at, call.op)
    specs = []
    for part in call.parts:
        specs.append(OPS[part.op].check(part, at, grad))
        at = at.after(specs[-1])
    return NetSpec(tuple(specs)) if call.op == "net" else specs[0]
