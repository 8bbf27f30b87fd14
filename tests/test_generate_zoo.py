"""Every public decoder, exported with a cache: we, transformers and GenAI generate the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
import planish
import pytest
import zoo

DECODERS = [
    name
    for name, architecture in zoo.ARCHITECTURES.items()
    if architecture.inputs == "decoder" and not architecture.fixed
]
NEW = 20


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_three_runtimes_say_the_same(name: str, tmp_path: Path) -> None:
    sample = zoo.build(name, zoo.ARCHITECTURES[name].attentions[0])
    ids = sample.kwargs["input_ids"]
    prompt = ids[:1]
    optimized = planish.optimize(sample.model, (ids,), recipe="exact", kv_cache=True)
    folder = optimized.export(tmp_path / "out", target="onnx")
    generator = planish.Generator(folder, threads=1)
    found = generator.generate(prompt, max_new_tokens=NEW)
    wanted = sample.model.generate(  # pyright: ignore[reportCallIssue]
        prompt, max_new_tokens=NEW, do_sample=False, use_cache=True
    )
    assert found == wanted[0, prompt.shape[1] :].tolist()
    reason = json.loads((folder / "planish.json").read_text())["genai"]
    if reason != "decoder":
        assert name == "deepseek_v3" and reason == "keys are 16 wide but values 12"
        return
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=prompt.shape[1] + NEW)
    theirs = genai.Generator(model, params)
    theirs.append_tokens(prompt.numpy().astype(np.int32))
    while not theirs.is_done():
        theirs.generate_next_token()
    shown = [token for token in found if token not in generator.ends]  # GenAI leaves the end out
    assert theirs.get_sequence(0).tolist()[prompt.shape[1] :] == shown
