"""The files in conf/, and the documentation of the schema."""

import ast
from pathlib import Path

import pytest

import nemo_popsd
from nemo_popsd.config.keys import describe, known_keys
from nemo_popsd.config.loading import load_config
from nemo_popsd.evaluation.markers import DEFAULT_MARKERS
from nemo_popsd.testbed.templates import TEMPLATES

PACKAGE = Path(nemo_popsd.__file__).parent
CONF = sorted((PACKAGE.parent / "conf").glob("**/*.yaml"))
DECLARATIONS = [
    *PACKAGE.glob("*/config.py"),
    PACKAGE / "config" / "schema.py",
    PACKAGE / "observability" / "metrics.py",
]


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.name)
def test_every_file_loads_and_is_named_after_its_run(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert config.output == f"runs/{path.stem}"
    assert not config.overwrite, "the same command must resume an interrupted run"


def test_tiny_repeats_the_templates_of_the_embedded_model() -> None:
    assert load_config(PACKAGE.parent / "conf" / "tiny.yaml").data.templates == TEMPLATES


@pytest.mark.parametrize("name", ["qwen3_8b", "qwen3_4b", "r1_distill_qwen_7b", "olmo3_7b_think"])
def test_the_papers_settings(name: str) -> None:
    config = load_config(PACKAGE.parent / "conf" / f"{name}.yaml")
    target, divergence = config.distillation.target, config.distillation.divergence
    assert (target.family, target.beta, target.cap, divergence.kind) == ("purified", 1.0, 10.0, "jsd")
    assert (config.student.adaptation, config.student.lora.rank, config.optimizer.lr) == ("lora", 64, 5e-6)
    assert (config.training.steps, config.training.prompts_per_step, config.training.checkpoint_every) == (200, 32, 50)
    assert (config.rollout.max_response_tokens, config.distillation.loss_mean) == (1024, "sequence")
    assert (config.rollout.temperature, config.rollout.top_p, config.rollout.top_k) == (1.1, 0.95, 20)
    assert (config.evaluation.samples_per_problem, config.evaluation.max_response_tokens) == (12, 38912)
    assert (config.student.lora.alpha, divergence.weight, config.data.enable_thinking) == (128, 0.5, True)
    assert (config.optimizer.clip_grad, config.optimizer.decay, config.optimizer.beta2) == (0.1, "constant", 0.999)


def test_the_papers_evaluation() -> None:
    config = load_config(PACKAGE.parent / "conf" / "paper_evaluation.yaml")
    settings = config.evaluation
    assert list(settings.sets) == ["aime24", "aime25", "hmmt25"]
    assert (settings.samples_per_problem, settings.temperature, settings.max_response_tokens) == (12, 1.0, 38912)
    assert (settings.top_p, settings.top_k, config.data.enable_thinking) == (1.0, 0, True)
    assert tuple(settings.markers) == DEFAULT_MARKERS
    training = load_config(PACKAGE.parent / "conf" / "qwen3_8b.yaml")
    assert config.data.templates == training.data.templates
    for name in ("samples_per_problem", "temperature", "top_p", "top_k", "max_response_tokens"):
        assert getattr(settings, name) == getattr(training.evaluation, name), name


@pytest.mark.parametrize("path", DECLARATIONS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_field_has_its_documentation_below_it(path: Path) -> None:
    fields = 0
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ClassDef):
            continue
        for position, item in enumerate(node.body):
            if isinstance(item, ast.AnnAssign):
                fields += 1
                below = node.body[position + 1] if position + 1 < len(node.body) else None
                documented = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                assert documented, f"{path}:{item.lineno}: {ast.unparse(item.target)} has no documentation"
    assert fields


def test_every_type_of_the_schema_can_be_described() -> None:
    assert len(DECLARATIONS) >= 9
    assert len(known_keys()) > 60
    for hint in known_keys().values():
        assert describe(hint)
