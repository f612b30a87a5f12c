"""The record of a shipped file as a model card, which a person and the hub can read: README.md, from templates/model-card.md.j2."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from ftkit import sandbox, templates
from ftkit.errors import RecipeError, visible
from ftkit.proof.record import RECORD, Record
from ftkit.units import bytes_text

TEMPLATE = "model-card.md.j2"
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$&])|(?<=\w)(:)(?=//)|(?<=www)(\.)")  # what would be read as more than text


def card(record: Record) -> str:
    """Markdown with the hub's YAML header. Raises RecipeError where the template was changed and cannot be rendered."""
    path = templates.folder() / TEMPLATE
    try:
        return sandbox.render(path.read_text(encoding="utf-8"), {"header": _header(record), **_values(record)}, "file")
    except sandbox.TemplateFault as fault:
        raise RecipeError(f"The template {path} {fault}.", f"take ftkit's own {TEMPLATE} again") from None


def plain(text: object) -> str:
    """A text on one line in which Markdown and HTML mean nothing."""
    return MARKDOWN.sub(lambda found: "\\" + found[0], " ".join(visible(str(text)).split()))


def fenced(text: str) -> str:
    """A text as a block of code, whatever it holds."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{visible(text)}\n{fence}"


def _header(record: Record) -> str:
    base, licence = record.base, record.base["licence"]
    header: dict[str, Any] = {}
    if base["kind"] == "hub":
        header |= {"base_model": base["reference"].partition("@")[0], "base_model_relation": "finetune"}
    header |= {key: licence[key] for key in ("license", "license_name", "license_link") if key in licence}
    header |= {
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "quantization": record.file.quantization,
        "tags": ["gguf", record.file.quantization, "llama.cpp", "ollama", "fine-tuned", record.settings["training"]["method"], "ftkit"],
    }
    return str(yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=10**9)).strip()


def _values(record: Record) -> dict[str, Any]:
    """What the template writes, each text made plain."""
    base, settings, proof = record.base, record.settings, record.proof
    return {
        "name": plain(record.name),
        "ollama_name": record.name,  # a recipe's own rule leaves nothing in it that a shell would read
        "file": {
            **_plain(vars(record.file)),
            "bits_per_weight": f"{record.file.bits_per_weight:.2f}",
            "size": bytes_text(record.file.size_bytes),
        },
        "file_name": record.file.name,  # made of the name above
        "base": plain(base["reference"]),
        "revision": plain(base["revision"] or ""),
        "base_files": [[plain(name), digest] for name, digest in base["sha256"].items()],
        "licence": plain(base["licence"].get("license", "")),
        "licence_file": plain(base["licence"].get("file", "")),
        "method": settings["training"]["method"],
        "merged_onto": plain(record.merged_onto),
        "bits": _bits(proof.get("bits_by_task")),
        "closed": _closed(record.closed),
        "trained": plain(_training(record.trained)),
        "trained_files": [[plain(name), digest] for name, digest in record.trained["sha256"].items()],
        "data": [
            [
                purpose,
                plain(file["name"]),
                file["sha256"] or ("a dataset of the hub, at this commit" if "@" in file["name"] else "not there"),
            ]
            for purpose, files in record.data.items()
            for file in files
        ],
        "system": fenced(settings["ship"]["system"]) if settings["ship"]["system"] else "",
        "right_by": plain(proof["right_by"]),
        "limits": proof["limits"],
        "checks": [[plain(check[key]) for key in ("name", "outcome", "detail")] for check in proof["checks"]],
        "scores": [
            [plain(name), f"{score['right']} of {score['rows']}", f"{score['percent']:.1f} %"] for name, score in proof["scores"].items()
        ],
        "forms": [[plain(name), *figures(form)] for name, form in proof["forms"].items()],
        "weighed": [
            [
                plain(one["quantization"]),
                bytes_text(one["bytes"]),
                "–" if one["kept_percent"] is None else f"{one['kept_percent']:.1f} %",
                plain(f"fails: {one['fails']}") if one.get("fails") else "",
            ]
            for one in proof["weighed"]
        ],
        "settings": [[plain(key), plain(shown(value))] for key, value in dotted(settings)],
        "stops": " ".join(plain(stop["token"]) for stop in record.stops),
        "context_length": next((value for key, value in record.says.items() if key.endswith(".context_length")), None),
        "num_ctx": settings["ship"]["num_ctx"],
        "versions": ", ".join(plain(f"{name} {version}") for name, version in record.versions["shipping"].items()),
        "record": RECORD,
    }


def _training(trained: Mapping[str, Any]) -> str:
    """Of a training; nothing of what was trained with another tool."""
    if "steps" not in trained:
        return ""
    return f"{trained['steps']} steps, the best {trained['best_step']}; {trained['trained_tokens']} tokens; {trained['verdict']}"


def _bits(bits: Mapping[str, Any] | None) -> str:
    if not bits or bits["why_not"]:
        return ""
    drawn = bits.get("at_random")
    beside = f" ({drawn:.2g} with as many in tensors at random)" if drawn is not None else ""
    figures = f"KL a token {bits['plain'] or 0:.2g} → {bits['by_task'] or 0:.2g}{beside}, on rows that did not choose them"
    return (
        f"{bits['tensors']} of its tensors have more bits than its type gives them, where rounding cost the task's answers most: {figures}."
    )


def _closed(closed: Mapping[str, Any] | None) -> str:
    if not closed or closed["why_not"]:
        return ""
    figures = f"KL a token {closed['before'] or 0:.2g} → {closed['after'] or 0:.2g}, on rows that this did not learn from"
    scales = f" and {closed['scales']:,} scales of its rows" if closed.get("scales") else ""
    what = f"{closed['vectors']} of its norms and biases{scales}"
    return f"Then {what} were trained towards the trained model, {closed['steps']} steps: {figures}."


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: plain(value) if isinstance(value, str) else value for key, value in values.items()}


def shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def figures(form: Mapping[str, Any]) -> list[str]:
    kept, far, alike = form["kept"], form["divergence"], form["agreed_percent"]
    return [
        f"{form['loss']:.3f}",
        f"{kept['percent']:.1f} % ({kept['low']:.1f} to {kept['high']:.1f})" if kept else "–",
        "–" if far is None else f"{far:.2g}",
        "–" if alike is None else f"{alike:.1f} %",
        "–" if form["outside"] is None else f"{form['outside']:.4g}",
    ]


def dotted(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The recipe's keys that are set, dotted."""
    found: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, dict) and prefix == "":
            found += dotted(value, f"{key}.")
        elif value is not None and prefix + key != "ship.system":
            found.append((prefix + key, value))
    return found
