"""All golden vectors that lie beside the repository hold, and the checker notices when they do not."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch

from tests.support import golden


def test_golden_vectors_hold(shared: Path) -> None:
    results = golden.run_folder(shared / "golden")
    assert len(results) >= 16
    assert not [failure for result in results for failure in result.failures]


@pytest.mark.parametrize("kind", ["images.expected", "o_proj.weight", "train.grad"])
def test_the_checker_notices_a_changed_number(shared: Path, tmp_path: Path, kind: str) -> None:
    name = "image_classifier"
    shutil.copy(shared / f"golden/{name}.json", tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({name: {}}))
    tensors = safetensors.torch.load_file(shared / f"golden/{name}.safetensors")
    key = next(key for key in tensors if kind in key and "position_encoding" not in key)
    tensors[key].view(-1)[0] += 0.05
    safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors")
    (result,) = golden.run_folder(tmp_path)
    assert result.failures
