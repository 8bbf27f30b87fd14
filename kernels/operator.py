"""A kernel's operation as a torch operator: the twin on the CPU, the launches on a GPU.

One opaque node in captured graphs; its shape rule is the twin on meta tensors.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .triton_spec import TritonSpec
from .triton_version import check_triton

_LIBRARIES: dict[str, torch.library.Library] = {}


def define(spec: TritonSpec) -> None:
    """Register the operator of a spec."""
    namespace, rest = spec.schema.split("::", 1)
    library = _LIBRARIES.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
    library.define(rest)
    name = rest.split("(", 1)[0]
    library.impl(name, functools.partial(_twin, spec), "CPU")
    library.impl(name, functools.partial(_launched, spec), "CUDA")
    torch.library.register_fake(spec.operator, functools.partial(_twin, spec), lib=library)


def _twin(spec: TritonSpec, *args: Any, **kwargs: Any) -> Any:
    return spec.twin(*args, **kwargs)


def _launched(spec: TritonSpec, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
    check_triton()
    return spec.plan(*args, **kwargs, arch=this_arch()).run()


@functools.cache
def this_arch() -> str:
    """The architecture of the current GPU: "sm_90" or "gfx942"."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"
