"""Pages for people: one self-contained HTML file, without network, for any screen.

Plots are plotly's, whose script is in the page once. Whatever comes from a run or a file is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import s3rec_dist
from s3rec_dist.config import EvaluationConfig
from s3rec_dist.reports.runs import STAGES, ReportError, Run, differences

if TYPE_CHECKING:
    from s3rec_dist.reports.compare import Comparison

COLOURS = ("#4c78a8", "#e4572e", "#54a24b", "#b279a2", "#f2a541", "#72b7b2", "#9d755d", "#ff9da6")
DASHES = ("solid", "dash", "dot", "dashdot")
TASKS = {
    "loss": "loss",
    "aap": "associated attributes (AAP)",
    "mip": "masked items (MIP)",
    "map": "masked attributes (MAP)",
    "sp": "segments (SP)",
}
PHASES = ("data", "reconstruct", "forward", "backward", "communication", "optimizer", "other")

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { overflow-wrap: anywhere; font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 72rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; } h3 { font-size: 1rem; margin: .5rem 0 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
.plots > div { min-width: 0; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.best { background: var(--soft); font-weight: 600; }
.note { opacity: .75; } .answer { font-size: 1.1rem; border-left: 4px solid #4c78a8; padding-left: .8rem; }
"""


def plotly() -> Any:
    """The library. Raises :class:`ReportError` where it is missing."""
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ReportError("pages need plotly: pip install 's3rec-dist[report]'") from error
    return go


def page(title: str, body: Iterable[str]) -> str:
    """A whole document."""
    plotly()
    from plotly.offline import get_plotlyjs

    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style>",
            f"<script>{get_plotlyjs()}</script></head><body>",
            f"<h1>{escape(title)}</h1>",
            *body,
            f'<p class="note">Made by s3rec_dist {s3rec_dist.__version__}.</p>',
            # each plot was drawn before those after it took their places beside it
            "<script>addEventListener('load', () => dispatchEvent(new Event('resize')))</script></body></html>",
        ]
    )


def table(header: Sequence[str], rows: Iterable[Sequence[object]], best: int | None = None) -> str:
    """An HTML table; row ``best`` stands out."""
    lines = ["<div class='scroll'><table><tr>", *(f"<th>{escape(name)}</th>" for name in header), "</tr>"]
    for i, row in enumerate(rows):
        cells = "".join(f"<td>{escape(_shown(cell))}</td>" for cell in row)
        lines.append(f"<tr{' class=best' * (i == best)}>{cells}</tr>")
    return "".join([*lines, "</table></div>"])


def _legend(label: str) -> str:
    return escape(label if len(label) <= 24 else f"{label[:12]}…{label[-11:]}")


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def figure(traces: Sequence[Any], title: str, x: str, y: str, **layout: Any) -> str:
    """A plot as HTML; ``x`` and ``y`` name the axes, with units."""
    go = plotly()
    axis = {"gridcolor": "rgba(128,128,128,.25)", "zerolinecolor": "rgba(128,128,128,.4)"}
    drawn = go.Figure(
        list(traces),
        {
            "title": {"text": escape(title), "font": {"size": 15}},
            "xaxis": {"title": {"text": escape(x)}, **axis},
            "yaxis": {"title": {"text": escape(y)}, **axis},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": "#767676"},
            "margin": {"l": 60, "r": 10, "t": 45, "b": 45},
            "height": 320,
            "legend": {"orientation": "h", "y": -0.25},
            "showlegend": len(traces) > 1,
            **layout,
        },
    )
    options = {"displayModeBar": False, "responsive": True}
    return f"<div>{drawn.to_html(full_html=False, include_plotlyjs=False, config=options)}</div>"


def lines(runs: Sequence[Run], name: str, title: str, y: str) -> str:
    """A metric of several runs over their steps; empty where none has it."""
    go = plotly()
    traces = []
    for run in runs:
        steps, values = run.curve(name)
        if steps:
            traces.append(
                go.Scatter(
                    x=steps, y=values, name=_legend(run.label), mode="lines+markers" if len(steps) < 40 else "lines",
                    line={**line_style(run.place), "width": 2}, marker={"size": 5},
                )
            )  # fmt: skip
    return figure(traces, title, "step", y) if traces else ""


def line_style(place: int) -> dict[str, str]:
    """Colour and dashes, of their own for the first 32 runs."""
    return {"color": COLOURS[place % len(COLOURS)], "dash": DASHES[place // len(COLOURS) % len(DASHES)]}


def report_page(
    runs: Sequence[Run],
    results: Sequence[Mapping[str, Any]] = (),
    datasets: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The page of ``s3rec report``. ``results`` are those of ``s3rec evaluate --json``, ``datasets`` facts by path."""
    body = [_summary(runs), _results(results), _validation(runs), _losses(runs), _speed(runs), _faults(runs)]
    body += [_datasets(datasets or {}), _differences(runs)]
    labels = dict.fromkeys(run.label for run in runs)
    return page(", ".join(labels), filter(None, body))


def _stages(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found = {stage: [run for run in runs if run.stage == stage] for stage in (*STAGES, "run")}
    return {stage: own for stage, own in found.items() if own}


def _summary(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        starts, done = run.events("start"), run.events("done")
        start = starts[-1] if starts else {}
        steps, _ = run.curve("train/loss")
        rows.append(
            [
                f"{run.label} {run.stage}", run.status, steps[-1] if steps else 0, start.get("steps", "-"),
                done[-1].get("took", "-") if done else "-", start.get("processes", "-"), start.get("device", "-"),
                start.get("precision", "-"), start.get("zero_stage", "-"), start.get("parameters", "-"),
            ]
        )  # fmt: skip
    header = ["run", "status", "step", "of", "time", "processes", "device", "precision", "ZeRO stage", "parameters"]
    return "<h2>Runs</h2>" + table(header, rows)


def _results(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return ""
    names = list(dict.fromkeys(name for result in results for name in result["metrics"]))
    rows = [[r["label"], *(float(r["metrics"][n]) if n in r["metrics"] else "-" for n in names)] for r in results]
    protocols = dict.fromkeys(f"{r['protocol']}; {r['users']:,} users" for r in results)
    comparable = len(results) > 1 and len(protocols) == 1
    best = max(range(len(results)), key=lambda i: results[i]["metrics"].get("MRR", 0)) if comparable else None
    notes = "".join(f'<p class="note">{escape(line)}</p>' for line in protocols)
    return "<h2>Results</h2>" + table(["model", *names], rows, best) + notes


def _validation(runs: Sequence[Run]) -> str:
    tuned = [run for run in runs if run.best()]
    if not tuned:
        return ""
    names = list(dict.fromkeys(name for run in tuned for name in run.best()))
    rows = [[run.label, *(run.best().get(name, "-") for name in names)] for run in tuned]
    metric = tuned[0].config.finetune.metric
    chosen = [run.best().get(metric, 0.0) for run in tuned]
    ways: dict[tuple[str, str], list[str]] = {}
    for run in tuned:
        ways.setdefault((run.config.finetune.metric, _candidates(run.config.evaluation)), []).append(run.label)
    comparable = len(tuned) > 1 and len(ways) == 1
    notes = [
        f"{', '.join(labels) if len(ways) > 1 else 'Each run'} at its best {chooser}: the item before each user's last "
        f"one, ranked among {candidates}."
        for (chooser, candidates), labels in ways.items()
    ]
    shown = [metric, *[name for name in names if name != metric][-3:]]
    plots = [lines(tuned, f"validation/{name}", f"{name} on validation items", name) for name in shown]
    return (
        "<h2>Validation</h2>"
        + table(["run", *names], rows, max(range(len(rows)), key=chosen.__getitem__) if comparable else None)
        + "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
        + '<p class="note">These chose the epoch; figures to quote are of <code>s3rec evaluate</code>, on test items.'
        + f"</p><div class=plots>{''.join(plots)}</div>"
    )


def _candidates(evaluation: EvaluationConfig) -> str:
    """What a held-out item is ranked among, in words."""
    if evaluation.protocol == "full":
        return "all items not yet seen"
    if evaluation.negatives_file:
        return f"the negatives of {evaluation.negatives_file}"
    return f"{evaluation.negatives} sampled items (seed {evaluation.seed})"


def _losses(runs: Sequence[Run]) -> str:
    parts = []
    for stage, own in _stages(runs).items():
        names = [name for run in own for name in run.names("train/")]
        losses = [name for name in TASKS if f"train/{name}" in names]
        plots = [lines(own, f"train/{name}", TASKS.get(name, name), "mean loss") for name in losses]
        plots.append(lines(own, "train/gradient_norm", "gradient norm", "norm"))
        parts.append(f"<h2>Losses: {escape(stage)}</h2><div class=plots>{''.join(plots)}</div>")
    return "".join(parts)


def _speed(runs: Sequence[Run]) -> str:
    go = plotly()
    parts = []
    for stage, own in _stages(runs).items():
        plots = [lines(own, "train/samples_per_second", "throughput", "samples/s")]
        medians = {phase: [_median(run.curve(f"time/{phase}_ms")[1]) for run in own] for phase in PHASES}
        if any(any(values) for values in medians.values()):
            bars = [
                go.Bar(y=[_legend(run.label) for run in own], x=values, name=phase, orientation="h",
                       marker={"color": COLOURS[i % len(COLOURS)]})
                for i, (phase, values) in enumerate(medians.items()) if any(values)
            ]  # fmt: skip
            plots.append(figure(bars, "where a step's time goes, median", "ms", "", barmode="stack"))
        plots.append(lines(own, "train/memory_mb", "largest memory of a process", "MB"))
        parts.append(f"<h2>Speed: {escape(stage)}</h2><div class=plots>{''.join(plots)}</div>")
    return "".join(parts)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def _faults(runs: Sequence[Run]) -> str:
    rows = [
        [f"{run.label} {run.stage}", entry["event"].replace("_", " "), entry.get("step", "-"), _facts(entry)]
        for run in runs
        for entry in run.faults
    ]
    return "<h2>What went wrong, and what came of it</h2>" + table(["run", "event", "step", ""], rows) if rows else ""


def _facts(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in entry.items() if key not in ("event", "time", "step"))


def _datasets(datasets: Mapping[str, Mapping[str, Any]]) -> str:
    if not datasets:
        return ""
    names = list(dict.fromkeys(name for facts in datasets.values() for name in facts))
    rows = [[path, *(facts.get(name, "-") for name in names)] for path, facts in datasets.items()]
    return "<h2>Data</h2>" + table(["dataset", *names], rows)


def _differences(runs: Sequence[Run]) -> str:
    parts = []
    for stage, own in _stages(runs).items():
        found = {key: values for key, values in differences(own).items() if key != "output"} if len(own) > 1 else {}
        if found:
            rows = [[key, *map(json.dumps, values)] for key, values in found.items()]
            labels = [run.label for run in own]
            parts.append(f"<h2>Settings that differ: {escape(stage)}</h2>" + table(["setting", *labels], rows))
    return "".join(parts)


def comparison_page(found: Comparison, metric: str) -> str:
    """The page of ``s3rec compare``."""
    go = plotly()
    names = list(found.metrics)
    metrics = list(found.metrics[names[0]])
    means = [found.metrics[name][metric].mean for name in names]
    rows = [
        [name, *(f"{own[key].mean:.4f} ({own[key].low:.4f} to {own[key].high:.4f})" for key in metrics)]
        for name, own in found.metrics.items()
    ]
    plots = []
    for key in dict.fromkeys([metric, *metrics]):
        own = [found.metrics[name][key] for name in names]
        bars = {
            "type": "data", "symmetric": False,
            "color": "#808080", "array": [e.high - e.mean for e in own], "arrayminus": [e.mean - e.low for e in own],
        }  # fmt: skip
        dots = go.Scatter(
            x=[e.mean for e in own], y=[escape(name) for name in names], error_x=bars, mode="markers",
            marker={"size": 10, "color": COLOURS[: len(names)]},
        )  # fmt: skip
        plots.append(figure([dots], key, key, "", margin={"l": 120, "r": 10, "t": 45, "b": 45}, height=260))
    gains = [
        [
            f"S3-Rec less {name}",
            *(f"{own[key].mean:+.4f} ({own[key].low:+.4f} to {own[key].high:+.4f})" for key in metrics),
        ]
        for name, own in found.gains.items()
    ]
    body = [
        f'<p class="answer">{escape(found.answer(metric))}</p>',
        table(["", *metrics], rows, max(range(len(names)), key=means.__getitem__)),
        f'<p class="note">{escape(found.protocol)}; {found.users:,} users. In brackets 95% intervals: users drawn with '
        f"replacement. Both trained models: {escape(found.settings)}.</p>",
        f"<div class=plots>{''.join(plots)}</div>",
        "<h2>Differences, user by user</h2>",
        table(["", *metrics], gains),
    ]
    return page(f"Does pretraining pay on {found.dataset}?", body)
