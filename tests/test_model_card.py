"""The model card: a method's own papers, and no local path where the hub expects an id."""

from pathlib import Path

import pytest
import yaml

from conftest import QUIET
from tsdkd.methods import METHODS
from tsdkd.trainer.model_card import write_model_card

TSD_KD, EOPD = "Explain in Your Own Words", "Entropy-Aware On-Policy Distillation"


def written(folder: Path, method: str, **changes: str) -> str:
    names = {"model_name": "m", "student": "Qwen/Qwen3-0.6B-Base", "teacher": "t", "dataset": "d", **changes}
    write_model_card(folder / "README.md", METHODS[method].config_class(str(folder), **QUIET), tags=[method], **names)
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", METHODS)
def test_a_card_cites_the_method_s_papers(method: str, tmp_path: Path) -> None:
    card = written(tmp_path, method)
    paper = METHODS[method].config_class.paper
    assert paper.split(", arXiv")[0] in card
    if "arXiv " in paper:
        assert f"https://arxiv.org/abs/{paper[-10:].removesuffix(')')}" in card or "EOPD Table" in paper
    assert (TSD_KD in card) == method.startswith("tsd-kd")
    assert (EOPD in card) == (method.startswith("eopd") or "EOPD" in paper)
    assert ("## Citation" in card) == (TSD_KD in card or EOPD in card)


def test_a_card_loads_the_student_from_its_folder_or_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "runs/c"
    assert f'AutoModelForCausalLM.from_pretrained("{folder}")' in written(folder, "gkd", model_name="c")
    names = {"model_name": "c", "student": "s", "teacher": "t", "dataset": "d"}
    args = METHODS["gkd"].config_class(str(folder), hub_model_id="me/c", **QUIET)
    write_model_card(folder / "README.md", args, tags=[], **names)
    assert 'AutoTokenizer.from_pretrained("me/c")' in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("max_steps", "listed", "left_out"), [(-1, "num_train_epochs", "max_steps"), (7, "max_steps", "num_train_epochs")]
)
def test_a_card_lists_the_duration_in_force(max_steps: int, listed: str, left_out: str, tmp_path: Path) -> None:
    args = METHODS["gkd"].config_class(
        str(tmp_path), max_steps=max_steps, **{k: v for k, v in QUIET.items() if k != "max_steps"}
    )
    names = {"model_name": "c", "student": "s", "teacher": "t", "dataset": "d"}
    write_model_card(tmp_path / "README.md", args, tags=[], **names)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"| `{listed}` |" in card and f"| `{left_out}` |" not in card


def test_local_paths_stay_out_of_the_metadata(tmp_path: Path) -> None:
    card = written(tmp_path, "gkd", student=str(tmp_path), dataset="org/prompts")
    metadata = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in metadata and metadata["datasets"] == ["org/prompts"]
    assert yaml.safe_load(written(tmp_path, "gkd").split("---")[1])["base_model"] == "Qwen/Qwen3-0.6B-Base"
