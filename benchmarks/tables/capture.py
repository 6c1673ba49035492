"""Turn launches into compile jobs: run a launcher on meta tensors, and keep what Triton would have compiled.

    with capture() as launches:
        conv_bn_act_3x3(spec, config, packed, x, None, None)      # tensors of device "meta": no memory, no GPU
    jobs = [launches[0].job(arch, config=str(config)) for arch in (80, 90, 100)]

What a kernel looks like depends on its launch: arguments that are None or 1 are compiled in, sizes and pointers that 16
divides are known to be so. Triton's own binder decides it here, as at every launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .machine_code import CompileJob


@dataclass(frozen=True)
class CapturedLaunch:
    """A launch that was recorded and not made."""

    fn: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grid: Any

    def job(self, arch: int, config: str = "") -> CompileJob:
        """Return what a GPU of this architecture would compile for it."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        fn, backend = self.fn, make_backend(GPUTarget("cuda", arch, 32))
        given = {**self.kwargs, "debug": False, "instrumentation_mode": ""}
        binder = create_function_from_signature(fn.signature, fn.params, backend)
        bound, specialization, extra = binder(*self.args, **given)
        _, signature, constants, hints = fn._pack_args(backend, given, bound, specialization, extra)
        names = fn.arg_names
        divisible = {names[path[0]]: n for path, known in hints.items() for what, n in known if "divisib" in what}
        constexprs = {names[path[0]]: value for path, value in constants.items()}
        options = {k: v for k, v in self.kwargs.items() if k not in names}
        return CompileJob(
            kernel=f"{fn.fn.__module__}:{fn.fn.__name__}",
            signature={n: t for n, t in signature.items() if n not in constexprs},
            constexprs=constexprs,
            arch=arch,
            num_warps=options.pop("num_warps", 4),
            num_stages=options.pop("num_stages", 3),
            attrs={n: 0 for n, t in signature.items() if t.startswith("*")} | divisible,
            config=config,
            options=options,
        )


@contextmanager
def capture() -> Iterator[list[CapturedLaunch]]:
    """Collect every launch of a ``@triton.jit`` function inside the ``with`` in place of making it.

    Outputs stay as they were, so a launcher must not look at them. Needs a process that does not interpret.
    """
    import triton
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        raise RuntimeError("capture() needs compiled kernels: unset TRITON_INTERPRET before triton is imported")
    launches: list[CapturedLaunch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(CapturedLaunch(self, args, kwargs, grid))

    plain = JITFunction.run
    try:
        JITFunction.run = run
        yield launches
    finally:
        JITFunction.run = plain
