"""A comparison as one HTML page that needs no other file, and the same pictures as PNG; light and dark."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np

from qwen_mlx.errors import QwenMLXError

from .comparison import Comparison, TapResult, logits_line
from .taps import CACHE_TAPS, LAYER_TAPS, TAPS, split_key

try:
    import matplotlib
except ImportError:
    raise QwenMLXError("--report needs matplotlib; in this repository: pip install -e '.[reference]'.") from None
matplotlib.use("Agg")
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image  # comes with matplotlib

SMALLEST = 1e-9  # where an error of exactly 0 is drawn on a logarithmic axis
THEMES = {
    "light": {
        "back": "#ffffff",
        "text": "#1f2328",
        "grid": "#d8dee4",
        "floor": "#c9d1d9",
        "ours": "#0b62c4",
        "bad": "#c4230b",
    },
    "dark": {
        "back": "#0d1117",
        "text": "#e6edf3",
        "grid": "#30363d",
        "floor": "#3d444d",
        "ours": "#6cb6ff",
        "bad": "#ff7b5c",
    },
}
MAPS = {"light": "viridis_r", "dark": "viridis"}  # the largest error has most contrast with the page

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --back: #ffffff; --text: #1f2328; --soft: #59636e; --line: #d8dee4; --bad: #c4230b;
  --good: #1a7f37; }}
@media (prefers-color-scheme: dark) {{ :root {{ --back: #0d1117; --text: #e6edf3; --soft: #9198a1; --line: #30363d;
  --bad: #ff7b5c; --good: #3fb950; }} }}
body {{ background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; max-width: 1120px;
  margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.2rem; margin-top: 2.5rem; }} .soft {{ color: var(--soft); }}
.passed {{ color: var(--good); font-weight: 600; }} .failed {{ color: var(--bad); font-weight: 600; }}
img {{ width: 100%; min-width: 720px; height: auto; display: block; margin: 1rem 0; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font: 13px/1.4 ui-monospace, monospace; width: 100%; }}
th, td {{ text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th:first-child, td:first-child, td:last-child, th:last-child {{ text-align: left; }}
</style></head><body>
<h1>{title}</h1>
<p class="soft">{about}</p>
{sections}
</body></html>
"""


def write_report(folder: Path, comparisons: list[Comparison], about: dict[str, Any]) -> Path:
    """Writes report.html and, for each run, RUN-errors-light.png and so on into `folder`. Returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for comparison in comparisons:
        parts = [f"<h2>{html.escape(comparison.run)}, {comparison.dtype}</h2>", _verdict(comparison)]
        for name, (draw, caption) in PICTURES.items():
            if name == "logits" and comparison.scatter is None:
                continue
            images = {theme: _png(draw(comparison, theme), THEMES[theme]["back"]) for theme in THEMES}
            for theme, image in images.items():
                (folder / f"{comparison.run}-{name}-{theme}.png").write_bytes(image)
            parts.append(_picture(images, caption))
        if comparison.logits:
            parts.append(f"<p>{html.escape(logits_line(comparison))}</p>")
        parts.append(_table(comparison))
        sections.append("\n".join(parts))
    text = f"{about['model']}: every activation against Hugging Face"
    page = PAGE.format(
        title=html.escape(text),
        about=html.escape(_about(about)),
        sections="\n".join(sections),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _about(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in about["seconds"].items())
    return (
        f"{len(about['ids'])} tokens, {about['dtype']}; reference {about['reference']} in float32, SHA-256 "
        f"{about['reference_sha256'][:16]}; limits from {about['limits']}; {versions}; {about['machine']}, "
        f"{about['date']}; {seconds}"
    )


def _verdict(comparison: Comparison) -> str:
    count = len(comparison.results)
    if comparison.passed:
        return f'<p><span class="passed">Passed</span>: all {count} activations are within their tolerances.</p>'
    first = comparison.first
    key = first.key if first else "none"
    cause = f" Likeliest cause: {html.escape(comparison.diagnosis)}." if comparison.diagnosis else ""
    return (
        f'<p><span class="failed">Failed</span>: {len(comparison.failures)} of {count} activations; the first '
        f"diverging is <code>{html.escape(key)}</code>.{cause}</p>"
    )


def _picture(images: dict[str, bytes], caption: str) -> str:
    light, dark = (base64.b64encode(images[theme]).decode() for theme in ("light", "dark"))
    return (
        '<div class="scroll"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">'
        f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{light}"></picture></div>'
        f'<p class="soft">{html.escape(caption)}</p>'
    )


def _table(comparison: Comparison) -> str:
    rows = []
    for tap, result in comparison.worst_by_tap().items():
        m = result.measure
        at = m.problem or (f"{result.key} {list(m.worst[0])}: {m.worst[1]:.6g}, {m.worst[2]:.6g}" if m.worst else "")
        cells = [
            tap,
            *(f"{value:.1e}" for value in (m.max_abs, m.l2, m.row)),
            f"{abs(1 - m.cosine):.1e}",
            *(f"{value:.1e}" for value in (result.tolerance.l2, result.tolerance.l2_floor)),
            at,
        ]
        kind = "" if result.passed else ' class="failed"'
        rows.append(f"<tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = (
        "tap",
        "max abs",
        "rel L2",
        "worst row",
        "1 - cosine",
        "tolerance",
        "noise floor",
        "worst value: ours, theirs",
    )
    header = "".join(f"<th>{cell}</th>" for cell in head)
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _png(figure: Figure, back: str) -> bytes:
    """256 colours are enough, and a third of the size."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130, facecolor=back)
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()


def _axes(width: float, height: float, theme: str) -> tuple[Figure, Any]:
    colours = THEMES[theme]
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor(colours["back"])
    axes.tick_params(colors=colours["text"], labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(colours["grid"])
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(colours["text"])
    axes.grid(axis="y", color=colours["grid"], linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _in_order(comparison: Comparison) -> list[tuple[int | None, str, TapResult]]:
    """(layer, tap, the worst of all calls) in the order of computation, the cache beside its layer."""
    worst: dict[tuple[int | None, str], TapResult] = {}
    for result in comparison.results:
        _, layer, tap = split_key(result.key)
        if (layer, tap) not in worst or result.ratio > worst[layer, tap].ratio:
            worst[layer, tap] = result
    last = max((layer for layer, _ in worst if layer is not None), default=0)
    taps = [*LAYER_TAPS, *CACHE_TAPS]
    order = [
        (None, "embeddings"),
        *((i, tap) for i in range(last + 1) for tap in taps),
        (None, "norm"),
        (None, "logits"),
    ]
    return [(layer, tap, worst[layer, tap]) for layer, tap in order if (layer, tap) in worst]


def _shown(value: float, top: float) -> float:
    return min(max(value, SMALLEST), top) if np.isfinite(value) else top


def draw_errors(comparison: Comparison, theme: str) -> Figure:
    """Relative L2 of every activation in the order of computation, over the noise floor."""
    colours = THEMES[theme]
    figure, axes = _axes(11, 4.2, theme)
    results = _in_order(comparison)
    finite = [r.measure.l2 for _, _, r in results if np.isfinite(r.measure.l2)]
    top = 10 * max([*finite, *(r.tolerance.l2 for _, _, r in results), SMALLEST])
    x = np.arange(len(results))
    floor = [_shown(r.tolerance.l2_floor, top) for _, _, r in results]
    limit = [_shown(r.tolerance.l2, top) for _, _, r in results]
    axes.fill_between(x, SMALLEST / 2, floor, step="mid", color=colours["floor"], linewidth=0, label="noise floor")
    axes.step(x, limit, where="mid", color=colours["text"], linewidth=0.6, alpha=0.6, label="tolerance")
    for good, colour, label, marker in ((True, "ours", "within", "o"), (False, "bad", "beyond its tolerance", "X")):
        chosen = [(i, _shown(r.measure.l2, top)) for i, (_, _, r) in enumerate(results) if r.passed == good]
        if chosen:
            size = 7 if good else 22
            axes.scatter(
                *zip(*chosen), s=size, color=colours[colour], marker=marker, label=label, zorder=3, linewidth=0
            )
    axes.set_yscale("log")
    axes.set_ylim(SMALLEST / 2, top)
    starts = [(i, layer) for i, (layer, tap, _) in enumerate(results) if tap == "input_norm"]
    step = max(1, len(starts) // 12)
    axes.set_xticks([i for i, _ in starts[::step]], [f"layer {layer}" for _, layer in starts[::step]])
    axes.set_xlim(-2, len(results) + 1)
    axes.set_ylabel("relative L2 error (0 is drawn at the bottom)")
    axes.legend(loc="upper left", ncols=4, frameon=False, fontsize=8, labelcolor=colours["text"])
    return figure


def draw_map(comparison: Comparison, theme: str) -> Figure:
    """Taps by layers, coloured by the error as a share of its tolerance."""
    colours = THEMES[theme]
    results = _in_order(comparison)
    taps = [tap for tap in TAPS if any(layer is not None and name == tap for layer, name, _ in results)]
    layers = 1 + max((layer for layer, _, _ in results if layer is not None), default=0)
    grid = np.full((len(taps), layers), np.nan)
    for layer, tap, result in results:
        if layer is not None:
            grid[taps.index(tap), layer] = _shown(result.ratio, 1e3)
    figure, axes = _axes(11, 4.6, theme)
    image = axes.imshow(grid, aspect="auto", cmap=MAPS[theme], norm=LogNorm(1e-2, 1e1), interpolation="nearest")
    axes.grid(False)
    axes.set_yticks(range(len(taps)), taps)
    axes.set_xticks(range(0, layers, max(1, layers // 24)))
    axes.set_xlabel("layer")
    for row, column in np.argwhere(grid > 1):
        axes.text(column, row, "x", ha="center", va="center", color=colours["back"], fontsize=9, fontweight="bold")
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label("error / tolerance", color=colours["text"], fontsize=8)
    bar.ax.tick_params(colors=colours["text"], labelsize=8)
    bar.outline.set_edgecolor(colours["grid"])
    return figure


def draw_logits(comparison: Comparison, theme: str) -> Figure:
    """Logits of ours against the reference's, and their difference."""
    colours = THEMES[theme]
    ours, theirs = comparison.scatter
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, values, label in zip(figure.subplots(1, 2), (ours, ours - theirs), ("ours", "ours - theirs")):
        axes.set_facecolor(colours["back"])
        axes.tick_params(colors=colours["text"], labelsize=8)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(colours["grid"])
        axes.grid(color=colours["grid"], linewidth=0.6)
        axes.set_axisbelow(True)
        finite = np.isfinite(values)
        axes.scatter(
            theirs[finite], values[finite], s=4, color=colours["ours"], alpha=0.5, linewidth=0, rasterized=True
        )
        axes.set_xlabel("logit of the reference", color=colours["text"])
        axes.set_ylabel(label, color=colours["text"])
        axes.yaxis.get_offset_text().set_color(colours["text"])
    return figure


PICTURES = {
    "errors": (draw_errors, "Error of every activation in the order of computation; grey: the reference's own noise."),
    "map": (draw_map, "Error as a share of its tolerance, taps by layers; an x is beyond it."),
    "logits": (draw_logits, "Logits of both sides (a sample), and how far they are apart."),
}
