"""A dataset's survey as one page that needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ftkit.data.survey import Survey
from ftkit.report.write import PAGE_SUFFIXES, check, write
from ftkit.train.suspects import Suspect
from ftkit.units import count_text

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #1a1a1a; background: #fff }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .25rem 1rem .25rem 0; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child, td:last-child, th:last-child { text-align: left }
.suspects td, .suspects th { text-align: left; vertical-align: top; white-space: pre-line; overflow-wrap: anywhere }
.bar { display: inline-block; height: .8rem; background: #0072b2 }
.row { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.6 ui-monospace, monospace }
.row span { border-right: 1px solid #bbb } .row .learnt { background: #8fd9c0; border-bottom: 2px solid #009e73 }
@media (prefers-color-scheme: dark) {
  body { color: #eee; background: #181818 } .row .learnt { color: #111 } td, th { border-color: #444 }
}
</style>
<h1>{{ title }}</h1>
<table>
<tr><th></th><th>rows</th><th>answers</th><th>not learnt</th><th>with system</th>
<th>with reasoning</th><th>calling tools</th><th>read as</th></tr>
{% for purpose, part in found.parts.items() %}
<tr>
<td>{{ purpose }}</td>
{% for number in (part.rows, part.answers, part.unlearnt, part.systems, part.reasoning, part.calls) %}
<td>{{ number }}</td>
{% endfor %}
<td>{% for form, rows in part.forms.items() %}{{ form }} ({{ rows }}){{ ", " if not loop.last }}{% endfor %}</td>
</tr>
{% endfor %}
</table>
{% for purpose, part in found.parts.items() if part.passed_over %}
<p>Columns of {{ purpose }} that are not read: {{ part.passed_over | join(", ") }}.</p>
{% endfor %}
<p>{{ found.examples }} examples to train and validate, {{ found.tokens.total | count }} tokens,
of which {{ found.learnt_tokens | count }} are learnt.
Median {{ found.tokens.median }} tokens, 95 % up to {{ found.tokens.p95 }}, longest {{ found.tokens.longest }}.</p>
<table><tr><th>tokens up to</th><th>examples</th><th></th></tr>
{% for entry in found.histogram %}
<tr>
<td>{{ entry.to_tokens }}</td><td>{{ entry.examples }}</td>
<td><span class="bar" style="width: {{ (20 * entry.examples / most) | round(2) }}rem"></span></td>
</tr>
{% endfor %}
</table>
<ul>
{% for finding in found.findings %}
<li>{{ finding.count }} {{ finding.what }}{% if finding.places %}: {{ finding.places | join("; ") }}{% endif %}</li>
{% else %}
<li>Nothing comes twice, contradicts or is cut.</li>
{% endfor %}
</ul>
{% if suspects %}
<h2>Suspects</h2>
<p>Rows that may be mislabelled, the most suspicious first: how far their answer stood out among the rows that training saw around the
same time, and how probable it was to the model, pass by pass, before it was learnt. “Likely”: the trained model answers otherwise too.
Not all are wrong.</p>
<table class="suspects"><tr><th>row</th><th>stands out</th><th></th><th>label</th><th>the model’s own answer</th>
<th>the label’s probability</th></tr>
{% for each in suspects %}
<tr>
<td>{{ each.place }}{% if each.contradicts %}<br>same question, another answer: {{ each.contradicts[:3] | join("; ") }}{% endif %}</td>
<td>{{ "%.1f" % each.score }}</td><td>{{ "likely" if each.likely }}</td>
<td>{{ each.label }}</td><td>{{ "–" if each.answer is none else each.answer }}</td>
<td>{% for p in each.probabilities %}{{ "%.0f" % (100 * p) }} {% endfor %}%</td>
</tr>
{% endfor %}
</table>
{% endif %}
{% for row in found.shown %}
<h2>{{ row.place }}</h2>
<p class="row">
{%- for token in row.tokens -%}
<span{% if token.learnt %} class="learnt"{% endif %} title="{{ token.id }}">{{ token.text }}</span>
{%- endfor %}</p>
{% endfor %}
</html>
"""


def write_page(found: Survey, path: Path, *, title: str, suspects: Sequence[Suspect] = ()) -> None:
    """Write the survey as one HTML file without scripts, fonts or pictures from elsewhere; texts of the dataset are escaped.

    Raises RecipeError for another suffix than .html or a folder that cannot be written.
    """
    import jinja2

    check(path, PAGE_SUFFIXES)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["count"] = count_text
    most = max(entry.examples for entry in found.histogram)
    write(path, environment.from_string(PAGE).render(found=found, title=title, most=most, suspects=suspects).encode())
