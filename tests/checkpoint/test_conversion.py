"""`popsd convert`: both directions, every architecture, bounded memory, verification, and loading in any layout."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_popsd.checkpoint.conversion import huggingface_to_nemo, to_huggingface
from nemo_popsd.checkpoint.distributed_tensors import DistributedTensors
from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.checkpoint.source import open_source
from nemo_popsd.config.loading import to_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError
from nemo_popsd.megatron.config import StudentConfig
from nemo_popsd.parallel.config import ParallelConfig
from tests.counted_kills import CountedKill
from tests.harness import TRANSFORMER_ENGINE, run_ranks
from tests.layers import on_transformer_engine
from tests.tiny_models import KINDS, assert_same_configuration, load_dense, save_tiny_model, whole_logits

IDS = torch.randint(0, 203, (2, 14), generator=torch.Generator().manual_seed(3))
EVERY_KIND = (*KINDS, "qwen3_moe")
FULL = StudentConfig(precision="fp32", adaptation="full")


def _tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _built(source: Any, world_size: int) -> Any:
    from nemo_popsd.megatron.build import build_chunks
    from nemo_popsd.parallel.distributed import initialize

    provider = source.architecture.provider()
    layout = ParallelConfig(tensor=world_size, sequence="false" if provider.num_moe_experts is None else "auto")
    initialize(layout, seed=1)
    [model] = build_chunks(provider, FULL, layout)
    source.load([model.eval()])
    return model


def _load_and_save(rank: int, world_size: int, sources: dict[str, Path], loads: Path, saves: Path) -> dict[str, Tensor]:
    """Loads the checkpoints in `loads`, saves them to `saves` as training does, and returns the logits."""
    from nemo_popsd.checkpoint.save import Content, save_nemo

    logits = {}
    for kind in sources:
        source = open_source(str(loads / kind))
        model = _built(source, world_size)
        logits[kind] = whole_logits(model, IDS, 203)
        config = to_dict_config(PopsdConfig(student=FULL))
        save_nemo(saves / kind, Content(models=[model], architecture=source.architecture, config=config, step=3))
    return logits


def _convert(rank: int, world_size: int, sources: dict[str, Path], output: Path) -> None:
    for kind, directory in sources.items():
        huggingface_to_nemo(HuggingFaceModel(directory), output / kind, "fp32")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_tiny_model(folder / kind, kind, seed=seed) for seed, kind in enumerate(EVERY_KIND)}


@pytest.fixture(scope="module")
def places(sources, tmp_path_factory):
    """Checkpoints that were converted, then loaded and saved with TP=1, with TP=2 and again with TP=1."""
    folder = tmp_path_factory.mktemp("nemo")
    run_ranks(_convert, 1, sources, folder / "converted", timeout=300.0)
    logits = {}
    for loads, saves, size in (("converted", "one", 1), ("one", "two", 2), ("two", "three", 1)):
        logits[saves] = run_ranks(_load_and_save, size, sources, folder / loads, folder / saves, timeout=300.0)
    logits["converted"] = run_ranks(_load_and_save, 2, sources, folder / "converted", folder / "four", timeout=300.0)
    return folder, logits


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_logits_agree_with_transformers_in_every_layout(places, sources, kind):
    with torch.no_grad():
        expected = load_dense(sources[kind])(IDS).logits
    for results in places[1].values():
        for result in results:
            torch.testing.assert_close(result[kind], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_tensors_are_bit_equal_after_a_conversion_and_saves_of_any_layout(places, sources, kind, tmp_path):
    before = _tensors(sources[kind])
    for place in ("converted", "one", "two", "three", "four"):
        to_huggingface(open_source(str(places[0] / place / kind)), tmp_path / place, "fp32", shard_bytes=9_000)
        after = _tensors(tmp_path / place)
        assert before.keys() == after.keys()
        assert [name for name in before if not torch.equal(before[name], after[name])] == [], place
    assert_same_configuration(tmp_path / "four", sources[kind])
    for file in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "four" / file).read_bytes() == (sources[kind] / file).read_bytes()
    with torch.no_grad():
        assert torch.equal(load_dense(tmp_path / "four")(IDS).logits, load_dense(sources[kind])(IDS).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_local_layers_are_saved_with_the_names_of_transformer_engine_layers(places, sources, kind):
    """Megatron-Bridge's mapping uses these names."""
    keys = {tensor.key for tensor in HuggingFaceModel(sources[kind]).tensor_map().tensors}
    for place in ("one", "two"):
        assert set(DistributedTensors(places[0] / place / kind / "weights").shapes) == keys
    fused = {"decoder.layers.self_attention.linear_qkv.layer_norm_weight"}
    fused |= {"decoder.layers.pre_mlp_layernorm.weight", "decoder.layers.mlp.experts.experts.linear_fc1.weight"}
    if kind == "qwen3_moe":
        assert fused <= keys
    elif kind != "olmo3":
        assert {
            f"decoder.layers.{n}.layer_norm_weight" for n in ("self_attention.linear_qkv", "mlp.linear_fc1")
        } <= keys


@pytest.fixture(scope="module")
def by_transformer_engine(sources, places, tmp_path_factory):
    """Converted checkpoints that two tensor-parallel ranks with TE layers have loaded and saved, and their logits."""
    folder = tmp_path_factory.mktemp("transformer_engine")
    arguments = sources, places[0] / "converted", folder
    return folder, run_ranks(_load_and_save, 2, *arguments, timeout=300.0, layers=TRANSFORMER_ENGINE)


@pytest.mark.slow
@on_transformer_engine
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_te_layers_load_and_save_the_same_tensors(by_transformer_engine, places, sources, kind, tmp_path):
    """Logits, names and shapes of tensors, and every bit."""
    folder, ranks = by_transformer_engine
    with torch.no_grad():
        expected = load_dense(sources[kind])(IDS).logits
    for logits in ranks:
        torch.testing.assert_close(logits[kind], expected, rtol=0, atol=2e-5)
    saved, converted = (place / kind / "weights" for place in (folder, places[0] / "converted"))
    assert DistributedTensors(saved).shapes == DistributedTensors(converted).shapes
    to_huggingface(open_source(str(folder / kind)), tmp_path / "hf", "fp32")
    before, after = _tensors(sources[kind]), _tensors(tmp_path / "hf")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def _converted_and_packed(rank: int, world_size: int, source: Path, folder: Path) -> None:
    for precision in ("fp32", "bf16"):
        huggingface_to_nemo(HuggingFaceModel(source), folder / f"{precision}.nemo", precision)


def test_weights_are_kept_or_rounded_once_and_the_precision_is_declared(sources, tmp_path):
    run_ranks(_converted_and_packed, 1, sources["qwen2"], tmp_path)
    before = _tensors(sources["qwen2"])
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        source = open_source(str(tmp_path / f"{precision}.nemo"))
        assert source.precision() == precision
        to_huggingface(source, tmp_path / precision, precision)
        after = _tensors(tmp_path / precision)
        assert all(torch.equal(after[name], before[name].to(dtype)) for name in before)
        assert json.loads((tmp_path / precision / "config.json").read_text())["dtype"] == str(dtype).split(".")[1]
        assert HuggingFaceModel(tmp_path / precision).precision() == precision
    assert {path.name for path in tmp_path.iterdir()} == {"fp32.nemo", "bf16.nemo", "fp32", "bf16"}


def test_the_precision_of_a_source_represents_all_its_weights(sources, tmp_path):
    for name, dtypes in {"bf16": [torch.bfloat16], "fp32": [torch.bfloat16, torch.float16]}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes((sources["qwen2"] / "config.json").read_bytes())
        tensors = sorted(_tensors(sources["qwen2"]).items())
        mixed = {key: tensor.to(dtypes[n % len(dtypes)]) for n, (key, tensor) in enumerate(tensors)}
        save_file(mixed, folder / "model.safetensors")
        assert HuggingFaceModel(folder).precision() == name


def _convert_non_finite(rank: int, world_size: int, nemo: Path, output: Path) -> str:
    from nemo_popsd.parallel.distributed import initialize

    initialize(ParallelConfig(tensor=world_size), seed=1)
    with pytest.raises(UserError) as error:
        to_huggingface(open_source(str(nemo)), output, "fp32")
    return str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_converted_to_hugging_face(sources, tmp_path, value):
    tensors = _tensors(sources["qwen2"])
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 2] = value
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_bytes((sources["qwen2"] / "config.json").read_bytes())
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    run_ranks(_convert, 1, {"nemo": tmp_path / "source"}, tmp_path)
    with pytest.raises(UserError, match=f"conversion to .*: got NaN or Inf in {name}; need finite weights"):
        to_huggingface(open_source(str(tmp_path / "nemo")), tmp_path / "hf", "fp32")
    messages = run_ranks(_convert_non_finite, 2, tmp_path / "nemo", tmp_path / "hf")
    assert all(f"NaN or Inf in {name}" in message for message in messages)
    assert not list(tmp_path.glob("hf*"))


def _verify(rank: int, world_size: int, sources: dict[str, Path], nemo: Path, folder: Path) -> list[Any]:
    """Verifies intact models, then one with a changed tensor, then one whose configuration has another rope_theta."""
    from nemo_popsd.checkpoint.verification import verify

    outcomes: list[Any] = []
    for kind, directory in sources.items():
        outcomes.append(verify(HuggingFaceModel(directory), open_source(str(nemo / kind)), "fp32"))
    for changed, other in ((folder / "changed", nemo / "qwen3"), (folder / "theta", folder / "nemo")):
        if changed.name == "theta":
            huggingface_to_nemo(HuggingFaceModel(sources["qwen3"]), other, "fp32")
        try:
            outcomes.append(verify(HuggingFaceModel(changed), open_source(str(other)), "fp32"))
        except UserError as error:
            outcomes.append(str(error))
    return outcomes


@pytest.mark.slow
def test_verification_accepts_equal_models_and_names_the_difference(places, sources, tmp_path):
    tensors = _tensors(sources["qwen3"])
    name = "model.layers.1.self_attn.k_proj.weight"
    for folder in ("changed", "theta"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_bytes((sources["qwen3"] / "config.json").read_bytes())
    save_file(tensors, tmp_path / "theta" / "model.safetensors")
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] = torch.nextafter(tensors[name][0, 0], torch.tensor(9.0))
    save_file(tensors, tmp_path / "changed" / "model.safetensors")
    # The same tensors, but another rotary embedding in transformers.
    config = json.loads((tmp_path / "theta" / "config.json").read_text())
    config.pop("rope_parameters", None)
    (tmp_path / "theta" / "config.json").write_text(json.dumps({**config, "rope_theta": 9000.0}))
    models = {kind: sources[kind] for kind in ("qwen3", "qwen3_moe", "llama3")}
    for size in (1, 2):
        for outcomes in run_ranks(_verify, size, models, places[0] / "converted", tmp_path):
            for outcome in outcomes[:3]:
                assert outcome.tensors > 10
                assert outcome.difference < 1e-5
                assert outcome.same_choice > 0.99
                assert outcome.tokens == 256 or not outcome.text
            assert f"1 different tensors, the first is {name}" in outcomes[3]
            assert "logits that differ by" in outcomes[4]


def _measure(rank: int, world_size: int, shallow: Path, deep: Path, folder: Path) -> list[int]:
    """Growth of anonymous memory in bytes, for each direction, when a deep model is converted after a shallow one with
    tensors of the same sizes."""
    from nemo_popsd.parallel.distributed import initialize

    initialize(ParallelConfig(), seed=1)
    grown = []
    for source in (shallow, deep):
        for convert in (_to_nemo, _to_huggingface):
            sampler = _PeakMemory()
            convert(source, folder / source.name)
            grown.append(sampler.growth())
    return grown[2:]


def _to_nemo(source: Path, folder: Path) -> None:
    huggingface_to_nemo(HuggingFaceModel(source), folder / "nemo", "fp32")


def _to_huggingface(source: Path, folder: Path) -> None:
    to_huggingface(open_source(str(folder / "nemo")), folder / "hf", "fp32", shard_bytes=1 << 20)


class _PeakMemory:
    """Samples the anonymous memory of this process in a thread; file pages are not counted."""

    def __init__(self) -> None:
        self._start = self._peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def growth(self) -> int:
        """Peak minus start, in bytes."""
        self._stop.set()
        self._thread.join()
        return self._peak - self._start

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._peak = max(self._peak, self._now())
            time.sleep(0.001)

    def _now(self) -> int:
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
        return int(line.split()[1]) << 10


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    sizes = {"vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1024}
    shallow = save_tiny_model(tmp_path / "shallow", "qwen2", num_hidden_layers=2, **sizes)
    deep = save_tiny_model(tmp_path / "deep", "qwen2", num_hidden_layers=24, **sizes)
    model_bytes = (deep / "model.safetensors").stat().st_size
    (tmp_path / "out").mkdir()
    [grown] = run_ranks(_measure, 1, shallow, deep, tmp_path / "out")
    assert model_bytes > 200 << 20
    # The allocator keeps tens of MiB of freed memory, independent of the depth.
    assert max(grown) < 0.25 * model_bytes, [round(growth / model_bytes, 3) for growth in grown]


def _convert_until_killed(rank: int, world_size: int, source: Path, nemo: Path, folder: Path, share: float) -> None:
    """Converts twice in both directions; the second time the process is killed at one of its file operations."""
    kill = CountedKill()
    for attempt in ("complete", "killed"):
        to_huggingface(open_source(str(nemo)), folder / f"hf-{share}-{attempt}", "fp32", shard_bytes=20_000)
        huggingface_to_nemo(HuggingFaceModel(source), folder / f"nemo-{share}-{attempt}", "fp32")
        kill.arm(share)


@pytest.mark.slow
def test_a_conversion_that_is_killed_leaves_a_complete_output_or_none(places, sources, tmp_path):
    source, nemo = sources["qwen3"], places[0] / "converted" / "qwen3"
    kills = 8
    for index in range(kills):
        with pytest.raises(AssertionError, match="exit code -9"):
            run_ranks(_convert_until_killed, 1, source, nemo, tmp_path, (index + 0.5) / kills)
    complete = [path for path in tmp_path.iterdir() if not path.name.endswith(".partial")]
    assert len(complete) >= 2 * kills
    interrupted = {path.name.partition("-")[0] for path in tmp_path.iterdir() if path.name.endswith(".partial")}
    assert interrupted == {"hf", "nemo"}, "no kill happened during the writing"
    expected = _tensors(source)
    for path in complete:
        if path.name.startswith("hf"):
            tensors = dict(HuggingFaceModel(path).tensors())
        else:
            tensors = dict(open_source(str(path)).tensors())
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected), path


def _refuse(rank: int, world_size: int, source: Path, output: Path) -> str:
    """A conversion whose verification fails on the logits."""
    from nemo_popsd.checkpoint import verification
    from nemo_popsd.commands.conversion import hf_to_nemo

    verification.TOLERANCE["fp32"] = -1.0  # no difference is small enough
    try:
        hf_to_nemo(str(source), str(output), precision="fp32", verifies=True, trust_remote_code=False)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_conversion_that_fails_its_verification_is_renamed(sources, tmp_path, size):
    for message in run_ranks(_refuse, size, sources["qwen3"], tmp_path / "out"):
        assert "logits that differ" in message
        assert f"renamed to {tmp_path / 'out.refused'}" in message
    assert [path.name for path in tmp_path.iterdir()] == ["out.refused"]
