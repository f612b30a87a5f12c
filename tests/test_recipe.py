"""A recipe is read whole or refused with every fault at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from ftkit import templates
from ftkit.errors import RecipeError
from ftkit.recipe import QUANTIZATIONS, Recipe, load_recipe, parse_override


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: org/name\n", encoding="utf-8")
    return path


def faults(path: Path, *settings: str) -> list[str]:
    """The message of a recipe that is refused, line by line."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [parse_override(text) for text in settings])
    return caught.value.message.splitlines()


def test_a_model_is_enough(minimal: Path) -> None:
    assert load_recipe(minimal) == Recipe(model="org/name")


def test_without_a_model_there_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {train: a.jsonl}\n", encoding="utf-8")
    assert faults(path)[1:] == ["  model: missing"]


def test_a_group_with_every_key_commented_out_has_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: org/name\nlora:\n  # r: 8\ntraining:\n  # seed: 1\nship: ~\n", encoding="utf-8")
    assert load_recipe(path) == Recipe(model="org/name")
    assert load_recipe(path, [("lora.r", 8)]).lora.r == 8


@pytest.mark.parametrize("text", ["model: " + "[" * 1000 + "]" * 1000, "".join(f"{' ' * n}a:\n" for n in range(1000))])
def test_a_recipe_that_is_nested_too_deeply(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    assert faults(path) == [f"{path} is nested too deeply."]
    with pytest.raises(RecipeError, match="the value is not YAML"):
        parse_override("model=" + "[" * 3000)


def test_a_value_of_any_size_is_shown_in_short(tmp_path: Path) -> None:
    """YAML's aliases make a value of a million items of a file of seven lines."""
    path = tmp_path / "recipe.yaml"
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 7))]
    path.write_text("\n".join([*lines, "model: *a6", "lora: {target_modules: *a6}"]), encoding="utf-8")
    assert sum(map(len, faults(path))) < 5000


@pytest.mark.parametrize("path", sorted(templates.folder().glob("*/recipe.yaml")), ids=lambda path: path.parent.name)
def test_the_starter_recipes_load_and_their_data_is_there(path: Path) -> None:
    data = load_recipe(path).data
    assert all((path.parent / name).is_file() for name in (data.train, data.validation, data.test) if name)


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("training.max_length=512", "training.max_length", 512),
        ("training.learning_rate=1e-4", "training.learning_rate", 1e-4),  # YAML 1.1 reads 1e-4 as text
        ("training.per_device_train_batch_size=4", "training.per_device_train_batch_size", 4),
        ("training.max_steps=null", "training.max_steps", None),
        ("lora.target_modules=[q_proj, v_proj]", "lora.target_modules", ["q_proj", "v_proj"]),
        ("ship.quantization=q5_k_m", "ship.quantization", "Q5_K_M"),
        ("ship.name=me.you-1:v2", "ship.name", "me.you-1:v2"),
        ("ship.system=a=b", "ship.system", "a=b"),
        ("budget.vram=24", "budget.vram", "24"),
        ("model=./other", "model", "./other"),
    ],
)
def test_set_changes_one_key(minimal: Path, setting: str, key: str, value: Any) -> None:
    changed = load_recipe(minimal, [parse_override(setting)]).model_dump()
    expected = Recipe(model="org/name").model_dump()
    *parents, last = key.split(".")
    part = expected[parents[0]] if parents else expected
    assert part[last] != value or value is None
    part[last] = value
    assert changed == expected


def test_a_later_set_wins(minimal: Path) -> None:
    assert load_recipe(minimal, [("lora.r", 4), ("lora.r", 8)]).lora.r == 8


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("trainning.seed=1", "trainning: unknown key; did you mean training?"),
        ("training.max_lenght=512", "training.max_lenght: unknown key; did you mean max_length?"),
        ("lora.alpha=32", "lora.alpha: unknown key; did you mean lora_alpha?"),
        ("ship.match=whole", "ship.match: unknown key; it is evaluate.by now"),
        ("tools.zzz=1", "tools.zzz: unknown key (known: llama_cpp_dir)"),
        ("training.max_length=long", "training.max_length: "),
        ("training.max_length=7", "training.max_length: Input should be greater than or equal to 8 (got 7)"),
        ("training.method=qlra", "training.method: "),
        ("training.learning_rate=1.5", "training.learning_rate: "),
        ("training.learning_rate=.nan", "training.learning_rate: "),
        ("data.validation_share=1", "data.validation_share: "),
        ("training.per_device_train_batch_size=3", "training: per_device_train_batch_size 3 does not divide effective_batch_size 8"),
        ("ship.quantization=Q4KM", "ship.quantization: unknown quantisation 'Q4KM'; did you mean Q4_K_M?"),
        ("ship.name=a/b c", "ship.name: use letters, digits"),
        ("budget.vram=lots", "budget.vram: `lots` is no amount of memory."),
        ("training=5", "training: "),
        ("training.learning_rate=10", "training.learning_rate: Input should be less than 1 (got 10)"),
        ("lora.modules_to_save=lm_head", "lora.modules_to_save: Input should be a valid list (got 'lm_head')"),
        ("lora.rank_pattern={q_proj: 0}", "lora.rank_pattern.q_proj: Input should be greater than or equal to 1 (got 0)"),
        ("lora.target_modules=[]", "lora: target_modules names nothing"),
        ("lora={target_parameters: [experts.down_proj], use_dora: true}", "lora: target_parameters does not go with use_dora"),
    ],
)
def test_a_fault_is_named_by_its_key(minimal: Path, setting: str, fault: str) -> None:
    first, *rest = faults(minimal, setting)
    assert str(minimal) in first
    assert len(rest) == 1
    assert rest[0].startswith("  " + fault)


@pytest.mark.parametrize("key", ["use_dora: true", "modules_to_save: [lm_head]", "rank_pattern: {q_proj: 2}"])
def test_what_is_of_adapters_alone_contradicts_full(minimal: Path, key: str) -> None:
    with pytest.raises(RecipeError, match=f"lora.{key.partition(':')[0]}: is of adapters, and training.method is full") as refused:
        load_recipe(minimal, [parse_override(f"lora={{{key}}}"), parse_override("training.method=full")])
    assert "training.method=lora" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("evaluate", "expected"),
    [
        ("{by: regex}", ["evaluate.pattern: is needed with `by: regex`"]),
        ("{by: regex, pattern: '(a'}", ["evaluate.pattern: is no regular expression: missing ) at position 2 (got '(a')"]),
        ("{by: regex, pattern: 'a+'}", ["evaluate.pattern: captures nothing: put what is compared in ( ) (got 'a+')"]),
        ("{by: regex, pattern: '((((a{100}){100}){100}){100})'}", ["evaluate.pattern: repeats too much, one {n} inside the other"]),
        (f"{{by: regex, pattern: '{'(' * 3000}{')' * 3000}'}}", ["evaluate.pattern: is no regular expression: maximum recursion depth"]),
        ("{by: labels}", ["evaluate.labels: is needed with `by: labels`"]),
        ("{by: labels, labels: []}", ["evaluate.labels: names nothing"]),
        ("{by: labels, labels: [a, ' ']}", ["evaluate.labels: one of them is empty"]),
        ("{by: labels, labels: [a, 'a ']}", ["evaluate.labels: 'a' stands there twice"]),
        ("{by: labels, labels: [a]}", ["evaluate.labels: at least two are wanted"]),
        ("{by: labels, labels: [yes, no]}", ["evaluate.labels: YAML reads yes, no, on and off as true and false"]),
        ("{by: json, keys: [], labels: [a, b]}", ["evaluate.keys: names nothing", "evaluate.labels: is of `by: labels`, and this is"]),
        ("{pattern: (a), keys: [a]}", ["evaluate.pattern: is of `by: regex`, and this is `by: whole`", "evaluate.keys: is of `by: json`"]),
        ("{by: exact, pattern: (a)}", ["evaluate.by: Input should be 'whole', "]),
        ("{by: json, key: [a]}", ["evaluate.key: unknown key; did you mean keys?"]),
    ],
)
def test_a_rule_of_scoring_is_looked_at_at_once(tmp_path: Path, evaluate: str, expected: list[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: org/name\nevaluate: {evaluate}\n", encoding="utf-8")
    shown = faults(path)[1:]
    assert len(shown) == len(expected), shown
    assert all(line.startswith("  " + fault) for line, fault in zip(shown, expected, strict=True)), shown


def test_labels_may_be_numbers(minimal: Path) -> None:
    assert load_recipe(minimal, [("evaluate.by", "labels"), ("evaluate.labels", [0, 1])]).evaluate.labels == ["0", "1"]


def test_an_unknown_quantisation_is_told_the_known_ones(minimal: Path) -> None:
    assert faults(minimal, "ship.quantization=zzz")[1].endswith(f"(known: smallest, {', '.join(QUANTIZATIONS)})")


def test_all_faults_come_at_once(minimal: Path) -> None:
    shown = faults(minimal, "lora.r=0", "training.max_lenght=1", "ship.quantization=Q4KM", "traning.seed=1")
    assert sorted(line.split(":")[0].strip() for line in shown[1:]) == ["lora.r", "ship.quantization", "training.max_lenght", "traning"]


def test_faults_are_named_by_keys_that_exist(minimal: Path) -> None:
    """`target_modules` may be text or a list; a fault in it is one fault, under the key that the recipe has."""
    shown = faults(minimal, "lora.target_modules=5")
    assert [line.split(":")[0].strip() for line in shown[1:]] == ["lora.target_modules"]


@pytest.mark.parametrize("text", ["foo", "=1", "a b=1", "training.=1", ".seed=1", "a=[1"])
def test_what_is_no_setting(text: str) -> None:
    with pytest.raises(RecipeError, match="--set") as caught:
        parse_override(text)
    assert caught.value.hint


def test_a_key_below_a_value_is_refused(minimal: Path) -> None:
    assert "`model.x`: model is no group of keys" in faults(minimal, "model.x=1")[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "holds no recipe"),
        (b"- a\n", "holds no recipe"),
        (b"model: x\n a: [2\n", "line 2: not YAML"),
        (b"model: !!python/object/apply:os.system [true]\n", "not YAML"),
        (b"model: \xff\n", "Cannot read"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    assert message in faults(path)[0]


def test_a_misspelt_recipe_gets_the_nearest_name(minimal: Path) -> None:
    with pytest.raises(RecipeError, match="There is no recipe") as caught:
        load_recipe(minimal.with_name("recpie.yaml"))
    assert caught.value.hint == "did you mean recipe.yaml?"
    with pytest.raises(RecipeError) as caught:
        load_recipe(minimal.with_name("zzz"))
    assert caught.value.hint == "make one: ftkit init"


def test_no_part_takes_unknown_keys_or_can_be_changed() -> None:
    parts = [Recipe, *(field.annotation for field in Recipe.model_fields.values())]
    for part in parts:
        if isinstance(part, type) and issubclass(part, BaseModel):
            assert part.model_config["extra"] == "forbid"
            assert part.model_config["frozen"]
