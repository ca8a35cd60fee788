"""A pipeline schedule as an SVG picture, which needs nothing else to be shown."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, StrictUndefined

from verify.schedules.laws import Plan
from verify.schedules.picture import LETTERS, MEANINGS, facts, label_of, title, works_of
from verify.schedules.table import Table
from verify.schedules.times import Times

ROW, GAP, MARGIN, TOP, CHARACTER = 26, 6, 76, 58, 7
# The first chunk's colour is the lightest.
COLOURS = {
    "forward": (204, 82),
    "backward": (138, 74),
    "input": (138, 74),
    "weight": (44, 78),
}
_DARKEST = 22

_TEMPLATE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ width }} {{ height }}" \
width="{{ width }}" height="{{ height }}" role="img" aria-labelledby="title">
<title id="title">{{ title }}</title>
<style>
text { font: 12px system-ui, sans-serif; fill: #1c1c1c; }
.work text { font-size: 11px; text-anchor: middle; }
.head { font-weight: 600; font-size: 14px; }
.axis { fill: #5a5a5a; font-size: 10px; text-anchor: middle; }
.idle { fill: #ececec; }
.work rect { stroke: #ffffff; }
</style>
<rect width="100%" height="100%" fill="#ffffff"/>
<text class="head" x="8" y="20">{{ title }}</text>
{% for each in legend %}
<rect x="{{ each.x }}" y="28" width="12" height="12" fill="{{ each.fill }}"/>
<text x="{{ each.x + 16 }}" y="38">{{ each.text }}</text>
{% endfor %}
{% for stage in stages %}
<text x="8" y="{{ stage.y + 17 }}">stage {{ loop.index0 }}</text>
<rect class="idle" x="{{ margin }}" y="{{ stage.y }}" width="{{ chart }}" height="{{ row }}"/>
{% for each in stage.works %}
<g class="work"><title>{{ each.tip }}</title>\
<rect x="{{ each.x }}" y="{{ stage.y }}" width="{{ each.width }}" height="{{ row }}" \
fill="{{ each.fill }}"/>\
<text x="{{ each.x + each.width / 2 }}" y="{{ stage.y + 17 }}">{{ each.text }}</text></g>
{% endfor %}
{% endfor %}
{% for each in ticks %}
<text class="axis" x="{{ each.x }}" y="{{ below }}">{{ each.text }}</text>
{% endfor %}
{% for line in lines %}
<text x="8" y="{{ below + 24 + 16 * loop.index0 }}">{{ line }}</text>
{% endfor %}
</svg>
"""


def svg(table: Table, plan: Plan) -> str:
    """The document. A work's colour is its kind, and the darker, the later the chunk."""
    times = Times(table, plan.vpp)
    longest = max(len(label_of(t.compute, plan.vpp)) for stage in times.stages for t in stage)
    unit = max(20, longest * CHARACTER + 6)
    lines = facts(times, plan)
    below = TOP + plan.pp * (ROW + GAP) + 8
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(_TEMPLATE).render(
        title=title(plan),
        width=max(MARGIN + times.span * unit + 12, 560),
        height=below + 24 + 16 * len(lines),
        margin=MARGIN,
        chart=times.span * unit,
        row=ROW,
        below=below,
        legend=_legend(plan),
        stages=_stages(times, plan, unit),
        ticks=[{"x": MARGIN + t * unit, "text": t} for t in range(0, times.span + 1, 5)],
        lines=lines,
    )


def _stages(times: Times, plan: Plan, unit: int) -> list[dict[str, Any]]:
    return [
        {
            "y": TOP + index * (ROW + GAP),
            "works": [
                {
                    "x": MARGIN + timed.begin * unit,
                    "width": (timed.end - timed.begin) * unit,
                    "fill": _colour(timed.compute.work, timed.compute.chunk, plan.vpp),
                    "text": label_of(timed.compute, plan.vpp),
                    "tip": f"{timed.compute}, from {timed.begin} to {timed.end}",
                }
                for timed in stage
            ],
        }
        for index, stage in enumerate(times.stages)
    ]


def _legend(plan: Plan) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    x = 8
    for work in works_of(plan):
        text = f"{LETTERS[work]} {MEANINGS[work]}"
        found.append({"x": x, "fill": _colour(work, 0, 1), "text": text})
        x += 32 + CHARACTER * len(text)
    return [*found, {"x": x, "fill": "#ececec", "text": "idle"}]


def _colour(work: str, chunk: int, vpp: int) -> str:
    hue, light = COLOURS[work]
    return f"hsl({hue}, 60%, {light - _DARKEST * chunk // max(vpp - 1, 1)}%)"
