"""The model card: what the hub reads of it, and that no text from elsewhere is more than text in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import shipped
import yaml
from markdown_it import MarkdownIt

from ftkit.proof.record import Record
from ftkit.report.card import card, fenced, plain

HOSTILE = "a | b\n---\nlicense: mit\n# head <script>x</script> [l](http://e.org) **b** `c` ![i](x) _d_ ``` &amp; http://e.org \x1b[2J \\"


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return shipped.record(shipped.make_file(tmp_path_factory.mktemp("card") / shipped.FILE, shipped.tokenizer()))


def parts(text: str) -> tuple[dict[str, Any], str]:
    """The header as YAML, and what follows."""
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def tokens(body: str) -> list[Any]:
    found = []
    for block in MarkdownIt("commonmark").enable("table").parse(body):
        found += [block, *(block.children or ())]
    return found


def test_the_hub_reads_its_header(record: Record) -> None:
    header, body = parts(card(record))
    assert header == {
        "base_model": "org/tiny", "base_model_relation": "finetune", "license": "apache-2.0", "library_name": "gguf",
        "pipeline_tag": "text-generation", "quantization": "F32",
        "tags": ["gguf", "F32", "llama.cpp", "ollama", "fine-tuned", "qlora", "ftkit"],
    }  # fmt: skip
    texts = [block.content for block in tokens(body)]
    for figure in ("9 of 10", "90.0 %", "99.5 % (98.0 to 101.0)", "0.01", "71.5 %", "18.25", record.file.sha256[:64], "0" * 40, "2" * 64):
        assert any(figure in text for text in texts), figure
    assert not [line for line in body.splitlines() if line.strip() in ("None", "|")]


def test_a_base_that_is_no_hub_model_is_named_in_the_text_alone(record: Record) -> None:
    base = {**record.base, "kind": "directory", "reference": "my-base", "licence": {}}
    header, body = parts(card(replace(record, base=base)))
    assert not header.keys() & {"base_model", "license"}
    assert "my-base, fine-tuned" in body
    assert "its files do not say" in body


def test_more_bits_are_said_where_they_ship(record: Record) -> None:
    bits = {"tensors": 7, "more_percent": 2.9, "plain": 0.048, "by_task": 0.034, "why_not": None}
    said = "7 of its tensors have more bits than its type gives them, where rounding cost the task's answers most: KL a token 0.048 → 0.034"
    assert said in card(replace(record, proof={**record.proof, "bits_by_task": bits}))
    assert "more bits" not in card(replace(record, proof={**record.proof, "bits_by_task": {**bits, "why_not": "it is no nearer"}}))
    assert "more bits" not in card(record)  # of an earlier ftkit


def test_texts_from_elsewhere_stay_texts(record: Record) -> None:
    named = [block.content for block in tokens(parts(card(record))[1]) if block.type == "inline"]
    settings = {**record.settings, "ship": {**record.settings["ship"], "system": f"{HOSTILE}\n````\n# out"}, "model": HOSTILE}
    check = {"name": HOSTILE, "outcome": "passed", "detail": HOSTILE}
    other = replace(
        record,
        base={**record.base, "kind": "directory", "reference": HOSTILE, "licence": {"license": HOSTILE}, "sha256": {HOSTILE: "1"}},
        data={"train": [{"name": HOSTILE, "sha256": None}]},
        stops=[{"id": 1, "token": HOSTILE}],
        settings=settings,
        trained={**record.trained, "verdict": HOSTILE},
        proof={**record.proof, "checks": [check]},
    )
    text = card(other)
    assert "\x1b" not in text
    header, body = parts(text)
    assert header["license"] == HOSTILE.replace("\x1b", "\ufffd") or header["license"] == HOSTILE
    found = tokens(body)
    kinds = {block.type for block in found}
    assert not kinds & {"link_open", "image", "strong_open", "em_open", "html_inline", "hr"}
    assert [block.content for block in found if block.type == "html_block"] == [
        "<details><summary>All settings</summary>\n",
        "</details>\n",
    ]
    headings = [found[n + 1].content for n, block in enumerate(found) if block.type == "heading_open"]
    assert headings == ["tiny", "Use it", "What was proven", "Where it comes from"]
    assert len([block for block in found if block.type == "fence"]) == 2
    before = sum(text.count("\n") for text in named)
    assert before == sum(block.content.count("\n") for block in found if block.type == "inline")


def test_markdown_means_nothing_in_a_plain_text() -> None:
    assert plain("a*b_c`d|e<f>\n#g") == r"a\*b\_c\`d\|e\<f\> \#g"
    assert plain("http://e.org www.e.org 1:2") == r"http\://e.org www\.e.org 1:2"


def test_a_fence_is_longer_than_what_it_holds() -> None:
    assert fenced("a\n````\nb").splitlines()[0] == "`````text"


def test_the_template_is_where_the_others_are(tmp_path: Path) -> None:
    from ftkit import templates
    from ftkit.report.card import TEMPLATE

    assert (templates.folder() / TEMPLATE).is_file()
