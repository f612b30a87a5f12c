"""A real model trained on rows of which some are wrong finds them; where none is wrong it names hardly any."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from ftkit.machine import packages

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
WORDS = {
    "animal": (
        "dog cat horse cow sheep goat lion tiger bear wolf fox rabbit mouse elephant monkey whale shark salmon eagle owl crow duck goose "
        "snake lizard frog spider bee ant butterfly zebra camel deer pig hen penguin dolphin crab turtle kangaroo giraffe donkey squirrel "
        "otter seal parrot pigeon sparrow swan turkey trout hamster leopard gorilla moose badger beaver walrus octopus lobster"
    ),
    "city": (
        "Paris London Berlin Madrid Rome Vienna Prague Warsaw Athens Dublin Lisbon Oslo Stockholm Helsinki Copenhagen Brussels Amsterdam "
        "Zurich Geneva Munich Hamburg Milan Naples Venice Barcelona Moscow Kiev Istanbul Cairo Nairobi Lagos Tokyo Osaka Kyoto Beijing "
        "Shanghai Seoul Bangkok Singapore Manila Jakarta Mumbai Delhi Sydney Melbourne Toronto Montreal Vancouver Chicago Boston Seattle "
        "Denver Houston Dallas Miami Atlanta Philadelphia Baghdad Lima Santiago"
    ),
}


@pytest.fixture
def look(
    tmp_path: Path, write_rows: Callable[[Path, list[Any]], Path], ftkit: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Train on all words, those at some lines with the other label, and list the suspects."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    rows = [(word, kind) for kind, words in WORDS.items() for word in words.split()]
    random.Random(0).shuffle(rows)  # noqa: S311
    other = {"animal": "city", "city": "animal"}

    def train(wrong: set[int]) -> dict[str, Any]:
        lines = enumerate(rows, 1)
        asked = [{"prompt": f"{word}: animal or city?", "completion": other[kind] if n in wrong else kind} for n, (word, kind) in lines]
        write_rows(tmp_path / "train.jsonl", asked)
        recipe = {
            "model": str(packages.bring("smollm2")),
            "data": {"template": "plain"},
            "training": {"method": "lora", "num_train_epochs": 2, "max_length": 64, "learning_rate": 1e-3, "seed": 1},
            "evaluate": {"by": "labels", "labels": list(WORDS)},
            "ship": {"max_new_tokens": 4},
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        trained = ftkit("train", tmp_path)
        assert trained.exit_code == 0, trained.output
        found: dict[str, Any] = json.loads(ftkit("data", tmp_path, "--suspects", "--json").stdout)
        return found

    return train


def test_wrong_labels_come_first(look: Callable[..., dict[str, Any]], report_figures: Callable[[str], None]) -> None:
    wrong = set(random.Random(1).sample(range(1, 121), 12))  # noqa: S311
    found = look(wrong)
    lines = [int(each["place"].rpartition(" ")[2]) for each in found["suspects"]]
    named = {line for line, each in zip(lines, found["suspects"], strict=True) if each["likely"]}
    by_chance = len(wrong & set(random.Random(2).sample(range(1, 121), len(lines))))  # noqa: S311
    report_figures(
        f"suspects: {len(wrong & set(lines))} of {len(wrong)} wrong rows among the first {len(lines)} of {found['rows']}, {by_chance} in a "
        f"random order; {len(named)} named likely, {len(named & wrong)} of them wrong"
    )
    assert len(lines) == round(0.15 * found["rows"]) == 18
    assert len(wrong & set(lines)) >= 0.7 * len(wrong) > by_chance
    assert len(named & wrong) >= 0.25 * len(wrong)
    assert len(named - wrong) <= 1
    clean = look(set())
    report_figures(f"suspects where none is wrong: {clean['likely']} of {clean['rows']} named likely")
    assert clean["likely"] <= 1
