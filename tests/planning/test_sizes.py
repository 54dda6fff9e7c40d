from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from nemo_popsd.embedded.names import asset
from nemo_popsd.errors import UserError
from nemo_popsd.planning.parameters import total_parameters
from nemo_popsd.planning.sizes import embedded_models, read_model_file, read_sizes

# As the model cards state them, in billions.
PUBLISHED = {
    "Qwen3-1.7B": 1.7,
    "Olmo-3-7B-Think": 7.3,
    "Qwen3-4B": 4.0,
    "Qwen3-8B": 8.2,
    "Qwen3-32B": 32.8,
    "Qwen3-30B-A3B": 30.5,
    "DeepSeek-R1-Distill-Qwen-7B": 7.6,
    "DeepSeek-R1-Distill-Llama-70B": 70.6,
}


@pytest.mark.parametrize("name", embedded_models())
def test_the_sizes_that_ship_add_up_to_the_published_parameters(name: str) -> None:
    sizes, origin = read_sizes(f"models/{name.lower()}")
    assert total_parameters(sizes) / 1e9 == pytest.approx(PUBLISHED[name], abs=0.06)
    assert "ship with nemo_popsd" in origin
    assert f"models/{name.lower()} is not on this machine" in origin


def test_a_directory_a_checkpoint_and_an_archive_are_read(tmp_path: Path) -> None:
    text = (asset("nemo_popsd:tiny_reasoner") / "config.json").read_text()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(text)
    (tmp_path / "nemo" / "huggingface").mkdir(parents=True)
    (tmp_path / "nemo" / "huggingface" / "config.json").write_text(text)
    with tarfile.open(tmp_path / "packed.nemo", "w") as archive:
        archive.add(tmp_path / "nemo", arcname=".")
    sources = ["nemo_popsd:tiny_reasoner", *(str(tmp_path / name) for name in ("hf", "nemo", "packed.nemo"))]
    sizes = [read_sizes(source)[0] for source in sources]
    assert {(s.hidden, s.layers, s.heads, s.groups, s.head_dim, s.vocab, s.tied) for s in sizes} == {
        (128, 4, 4, 2, 48, 489, True)
    }


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_has_the_name_of_either_transformers(tmp_path: Path, name: str) -> None:
    content = dict(read_model_file("Qwen3-30B-A3B").content)
    (tmp_path / "config.json").write_text(json.dumps({name: content.pop("num_experts"), **content}))
    assert read_sizes(str(tmp_path))[0].experts == 128


def test_a_directory_is_not_used_as_the_name_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "Qwen3-8B").mkdir()
    with pytest.raises(UserError, match="which has no config"):
        read_sizes(str(tmp_path / "Qwen3-8B"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deepseek_v3"}, "model_type='deepseek_v3'"),
        ({"mlp_only_layers": [0]}, "dense layers among sparse ones"),
        ({"hidden_size": None}, None),
    ],
)
def test_unsupported_architectures_and_damaged_files_are_refused(
    tmp_path: Path, change: dict, message: str | None
) -> None:
    config = json.loads((asset("nemo_popsd:tiny_reasoner") / "config.json").read_text())
    config = {name: value for name, value in {**config, **change}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message or "a config.json with hidden_size=None"):
        read_sizes(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="damaged data"):
        read_sizes(str(tmp_path))


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="Qwen3-8B"):
        read_sizes("models/none")
