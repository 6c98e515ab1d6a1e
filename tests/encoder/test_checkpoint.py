import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resight.encoder.checkpoint import Provenance, load_checkpoint, write_checkpoint
from resight.encoder.model import Encoder, EncoderConfig
from resight.errors import CheckpointError
from resight.image import ImageSpec

CONFIG = EncoderConfig(embedding_dim=32, image=ImageSpec(64, 32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    provenance = Provenance({"name": "purify"}, "student", 4, "abc", {"name": "builtin"}, ({"loss": 1.5},))
    write_checkpoint(tmp_path / "model", Encoder(CONFIG), provenance, resume={"0.step": torch.tensor(3.0)})
    return tmp_path / "model"


def test_a_written_checkpoint_is_read_back(folder: Path) -> None:
    found = load_checkpoint(folder)
    torch.manual_seed(0)
    expected = Encoder(CONFIG).state_dict()
    assert found.encoder.config == CONFIG and not found.encoder.training
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.encoder.state_dict().items())
    assert found.provenance == Provenance(
        {"name": "purify"}, "student", 4, "abc", {"name": "builtin"}, ({"loss": 1.5},)
    )
    assert found.resume["0.step"].item() == 3.0
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.json",
        "model.safetensors",
        "optimizer.safetensors",
    ]


def test_writing_again_replaces_the_whole_folder(folder: Path) -> None:
    write_checkpoint(folder, Encoder(CONFIG), Provenance(epoch=9))
    assert load_checkpoint(folder).provenance.epoch == 9
    assert not (folder / "optimizer.safetensors").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_other_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        write_checkpoint(tmp_path / "photos", Encoder(CONFIG), Provenance())
    assert (tmp_path / "photos" / "a.jpg").read_bytes() == b"x"


def test_errors_name_the_missing_folder_or_file(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.json is missing"):
        load_checkpoint(folder.parent)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        load_checkpoint(folder)


def test_a_newer_schema_is_rejected(folder: Path) -> None:
    index = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps({**index, "schema_version": 2}))
    with pytest.raises(CheckpointError, match="schema version 2"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"schema_version": 1}', '{"schema_version": 1, "encoder": {}, "provenance": {}}']
)
def test_a_damaged_index_is_rejected(folder: Path, content: str) -> None:
    (folder / "checkpoint.json").write_text(content)
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)


def test_truncated_weights_are_rejected(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(folder)


def test_errors_for_another_architecture_list_tensors(folder: Path) -> None:
    index = json.loads((folder / "checkpoint.json").read_text())
    index["encoder"]["backbone"] = "resnet18"
    (folder / "checkpoint.json").write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"resnet18 encoder: .* missing \(backbone.conv1.weight.*unexpected \(backbone"
    ):
        load_checkpoint(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["heads.global.neck.weight"] = torch.ones(31)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"heads\.global\.neck\.weight \(31,\) instead of \(32,\)"):
        load_checkpoint(folder)
