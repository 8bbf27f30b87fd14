"""Run this package: `load(folder)(inputs)`. Needs torch and triton, not planish.

The manifest `planish.json` says what belongs to the package. Nothing is executed before every file
was found to be the one that was written: sizes, SHA-256 and versions are checked first. On a GPU
whose architecture was compiled ahead of time its binaries are launched; launches without one are
compiled by Triton. On the CPU kernels run in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import mmap
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

MANIFEST = "planish.json"
FORMAT = 1
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class PackageRefused(Exception):
    """The folder is not the package that was written, or this machine cannot run it."""


def load(folder: str | Path, device: str | torch.device | None = None) -> Package:
    """Check the folder and load it onto a device (default: the GPU if there is one).

    Raises PackageRefused: a file that is missing, changed or outside of the folder, another
    format or another series of Triton than the package was verified with.
    """
    place = Path(folder)
    manifest = check(place)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Package(place, manifest, chosen)


def check(folder: Path) -> dict[str, Any]:
    """The manifest, after every file that it names was found unchanged; raises PackageRefused."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        section, files = manifest["triton"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackageRefused(f"{folder} has no manifest of a Triton package: {error}") from error
    if section.get("format") != FORMAT:
        raise PackageRefused(f"{folder} has format {section.get('format')}, expected {FORMAT}")
    _check_triton(str(section["triton"]))
    for name, wanted in files.items():
        _check_file(folder, name, wanted)
    named = [*section["modules"], section["weights"]]
    named += [f for kept in section["binaries"].values() for v in kept for f in v["files"]]
    for name in named:
        if name not in files:
            raise PackageRefused(f"the manifest of {folder} uses {name}, which it does not list")
    return manifest


def _check_triton(series: str) -> None:
    try:
        installed = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise PackageRefused(f"triton is not installed: pip install 'triton=={series}.*'") from None
    if installed.split(".")[:2] != series.split("."):
        raise PackageRefused(
            f"the package was verified with triton {series}.*, found {installed}: "
            f"pip install 'triton=={series}.*'"
        )


def _check_file(folder: Path, name: str, wanted: Mapping[str, Any]) -> None:
    pure = PurePosixPath(name)
    path = folder / pure
    outside = pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name
    if outside or not path.resolve().is_relative_to(folder.resolve()):
        raise PackageRefused(f"the manifest names a file outside of its folder: {name!r}")
    if not path.is_file():
        raise PackageRefused(f"{name} is missing in {folder}")
    size = path.stat().st_size
    if size != wanted["bytes"]:
        raise PackageRefused(f"{name} has {size} bytes, expected {wanted['bytes']}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wanted["sha256"]:
        raise PackageRefused(f"{name} was changed: its SHA-256 is not that of the manifest")


class Package:
    """A loaded package: called with the inputs in order, returns the list of results.

    launcher: what makes a launch; by default a binary if there is one, else Triton's JIT.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], device: torch.device) -> None:
        self.manifest, self.device = manifest, device
        self.section: Mapping[str, Any] = manifest["triton"]
        self.arch = _arch(device) or str(self.section["archs"][0])
        self.weights = read_weights(folder / self.section["weights"], device)
        self.launcher: Callable[[Any], None] = _launcher(folder, self)
        model = _import(folder, self.section["modules"])
        self._forward: Callable[..., list[Any]] = model.forward

    def __call__(self, *inputs: Any) -> list[Any]:
        """Run on tensors of the device; shapes and dtypes as the manifest's `inputs` say."""
        self._check_inputs(inputs)
        with torch.no_grad():
            return self._forward(self.run, self.weights, self.device, self.arch, *inputs)

    def run(self, plan: Any) -> Any:
        """Make the launches of a plan; returns its results."""
        for launch in plan.launches:
            if 0 not in launch.grid:
                self.launcher(launch)
        return plan.outputs[0] if len(plan.outputs) == 1 else plan.outputs

    def _check_inputs(self, inputs: Sequence[Any]) -> None:
        wanted = self.manifest["inputs"]
        if len(inputs) != len(wanted):
            names = ", ".join(spec["name"] for spec in wanted)
            raise ValueError(f"expected {len(wanted)} inputs ({names}), found {len(inputs)}")
        for value, spec in zip(inputs, wanted, strict=True):
            sizes = [s.strip() for s in spec["shape"].strip("[]").split(",") if s.strip()]
            fits = len(sizes) == value.dim() and all(
                want in ("*", str(have)) for want, have in zip(sizes, value.shape, strict=True)
            )
            dtype = self.section["input_dtypes"][spec["name"]]
            if not fits or str(value.dtype) != dtype or value.device.type != self.device.type:
                raise ValueError(
                    f"input {spec['name']}: expected {dtype} {spec['shape']} on {self.device}, "
                    f"found {value.dtype} {list(value.shape)} on {value.device}"
                )


def _arch(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _import(folder: Path, names: Sequence[str]) -> types.ModuleType:
    """Execute the package's sources in order, as they were checked, and return the last."""
    root = f"planish_package_{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]}"
    for package in (root, f"{root}.kernels"):
        module = types.ModuleType(package)
        module.__path__ = []
        sys.modules[package] = module
    module = sys.modules[root]
    for name in names:
        path = folder / name
        dotted = ".".join([root, *PurePosixPath(name).with_suffix("").parts])
        module = types.ModuleType(dotted)
        module.__file__, module.__package__ = str(path), dotted.rpartition(".")[0]
        sys.modules[dotted] = module
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
        setattr(sys.modules[module.__package__], dotted.rpartition(".")[2], module)
    return module


def read_weights(path: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, memory-mapped and moved to the device one by one."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    length = int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8 : 8 + length])
    found: dict[str, torch.Tensor] = {}
    for name, told in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = DTYPES[told["dtype"]], told["shape"]
        start, _ = told["data_offsets"]
        count = math.prod(shape)
        if count == 0:
            found[name] = torch.empty(shape, dtype=dtype, device=device)
            continue
        flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=8 + length + start)
        found[name] = flat.reshape(shape).to(device)
    return found


def _launcher(folder: Path, package: Package) -> Callable[[Any], None]:
    kept = package.section["binaries"].get(package.arch)
    if package.device.type != "cuda" or not kept:
        return _just_in_time
    return Binaries(folder, kept, Driver(bool(torch.version.hip)))


def _just_in_time(launch: Any) -> None:
    launch.run()


class Binaries:
    """Launches machine code that was compiled ahead of time, where it fits a launch.

    Of a kernel there are variants: for aligned pointers and sizes, and one that assumes nothing.
    """

    def __init__(self, folder: Path, kept: Sequence[Mapping[str, Any]], driver: Any) -> None:
        self.folder, self.driver = folder, driver
        self.variants: dict[str, list[Mapping[str, Any]]] = {}
        for variant in kept:
            self.variants.setdefault(variant["key"], []).append(variant)
        for variants in self.variants.values():
            variants.sort(key=lambda v: -sum(len(v[k]) for k in ("aligned", "ones", "near")))
        self.loaded: dict[str, Any] = {}
        self.missed: dict[str, int] = {}

    def __call__(self, launch: Any) -> None:
        variant = self.find(launch)
        if variant is None:
            self.missed[launch.name] = self.missed.get(launch.name, 0) + 1
            launch.run()
            return
        binary = next(name for name in variant["files"] if not name.endswith(".ptx"))
        if binary not in self.loaded:
            code = (self.folder / binary).read_bytes()
            self.loaded[binary] = self.driver.load(code, variant["name"], variant["shared"])
        values = [launch.args[name] for name in variant["parameters"]]
        types_ = [variant["signature"][name] for name in variant["parameters"]]
        self.driver.launch(
            self.loaded[binary], launch.grid, variant["threads"], variant["shared"], types_, values
        )

    def find(self, launch: Any) -> Mapping[str, Any] | None:
        """The most special variant whose assumptions the launch's arguments meet."""
        aligned = set(launch.aligned())
        ones = {n for n, v in launch.args.items() if type(v) is int and v == 1}
        for variant in self.variants.get(launch_key(launch), ()):
            near = all(launch.args[n].untyped_storage().nbytes() < 2**31 for n in variant["near"])
            if near and aligned.issuperset(variant["aligned"]) and ones.issuperset(variant["ones"]):
                return variant
        return None


def launch_key(launch: Any) -> str:
    """What a binary is compiled for, apart from what it assumes of the numbers."""
    constants = {
        name: getattr(value, "__name__", value) for name, value in sorted(launch.fixed().items())
    }
    types_ = list(launch.signature().values())
    told = [launch.name, types_, constants, launch.num_warps, launch.num_stages]
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()[:24]


class Driver:
    """The few calls of the CUDA or HIP driver that load and launch machine code."""

    def __init__(self, hip: bool) -> None:
        import ctypes

        self.c, self.hip = ctypes, hip
        self.library = ctypes.CDLL("libamdhip64.so" if hip else "libcuda.so.1")

    def _call(self, name: str, *args: Any) -> None:
        code = getattr(self.library, ("hip" if self.hip else "cu") + name)(*args)
        if code:
            raise RuntimeError(f"{'hip' if self.hip else 'cu'}{name} failed with code {code}")

    def load(self, code: bytes, name: str, shared: int) -> Any:
        """The function of a binary, allowed its dynamic shared memory (bytes)."""
        c, module, function = self.c, self.c.c_void_p(), self.c.c_void_p()
        self._call("ModuleLoadData", c.byref(module), code)
        self._call("ModuleGetFunction", c.byref(function), module, name.encode())
        if shared > 48 * 1024 and not self.hip:
            self._call("FuncSetAttribute", function, 8, c.c_int(shared))
        return function

    def launch(
        self,
        function: Any,
        grid: Sequence[int],
        threads: int,
        shared: int,
        types_: Sequence[str],
        values: Sequence[Any],
    ) -> None:
        """On torch's current stream. Triton's two scratch pointers follow, unused."""
        c = self.c
        kinds = {"i32": c.c_int32, "i64": c.c_int64, "fp32": c.c_float}
        boxes = [
            c.c_void_p(value.data_ptr()) if kind.startswith("*") else kinds[kind](value)
            for kind, value in zip(types_, values, strict=True)
        ]
        boxes += [c.c_void_p(0), c.c_void_p(0)]
        pointers = (c.c_void_p * len(boxes))(*(c.addressof(box) for box in boxes))
        x, y, z = (*grid, 1, 1)[:3]
        stream = c.c_void_p(torch.cuda.current_stream().cuda_stream)
        name = "ModuleLaunchKernel" if self.hip else "LaunchKernel"
        self._call(name, function, x, y, z, threads, 1, 1, shared, stream, pointers, None)
