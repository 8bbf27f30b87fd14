"""onnxruntime's own quantization as contestants: dynamic int8, packed weights; and optimum's.

optimum's quantizer calls the same function for dynamic int8; it has a row of its own because it
does not import beside every transformers.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_worker import sibling

Told = Mapping[str, Any]

IMPORTS = ["onnxruntime"]
PACKAGES = ["onnxruntime", "onnx", "onnxscript", "optimum", "optimum-onnx", "torch", "transformers"]
_NBITS = {"heat": "int8", "bits": 9, "head_bits": 9}
CONTESTANTS: list[dict[str, Any]] = [
    {
        "name": name,
        "kind": kind,
        "heat": "int8",
        "bits": 8,
        "head_bits": 8,
        "compute": "int8",
        "options": {"how": how},
    }
    for kind in ("decoder", "encoder")
    for name, how in (("onnxruntime dynamic int8", "dynamic"), ("optimum dynamic int8", "optimum"))
] + [
    {
        "name": f"onnxruntime MatMulNBits int{bits}",
        "kind": "decoder",
        "heat": f"int{bits}",
        "bits": bits + 1,
        "head_bits": bits + 1,
        "compute": "int8",
        "options": {"how": "nbits", "bits": bits},
    }
    for bits in (8, 4)
]


def prepare(options: Told, model: Told, out: Path) -> None:
    """Export, then quantize."""
    if options["how"] == "optimum":
        import optimum.onnxruntime.quantization  # noqa: F401 - it may fail, before the export

    plain = out / "float32"
    plain.mkdir()
    sibling("bench_onnxruntime").export_onnx(model, plain)
    if options["how"] == "optimum":
        _optimum(plain, model, out)
    elif options["how"] == "dynamic":
        _dynamic(plain, out)
    else:
        _nbits(plain, out, options["bits"])
    shutil.rmtree(plain)


def _optimum(plain: Path, model: Told, out: Path) -> None:
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    shutil.copy(Path(model["folder"]) / "config.json", plain)
    config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    quantizer = ORTQuantizer.from_pretrained(plain, file_name="model.onnx")
    quantizer.quantize(save_dir=out, quantization_config=config, file_suffix="")


def _dynamic(plain: Path, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        plain / "model.onnx",
        out / "model.onnx",
        weight_type=QuantType.QInt8,
        per_channel=True,
        use_external_data_format=True,
    )


def _nbits(plain: Path, out: Path, bits: int) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(plain / "model.onnx")
    quantizer = MatMulNBitsQuantizer(
        model, bits=bits, block_size=32, is_symmetric=bits == 8, accuracy_level=4
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(out / "model.onnx"), True)


def load(options: Told, model: Told, path: Path, threads: int) -> Any:
    """An engine of bench_worker."""
    return sibling("bench_onnxruntime").load(options, model, path, threads)
