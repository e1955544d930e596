"""One self-contained HTML page of a morph, an inversion, an edit, the distances between frames and the numbers.

The page opens offline: pictures are data URIs, styles and script are inlined, fonts are the reader's own. A variant is
"base" (the model alone) or "smooth" (with its Smooth-LoRA); a page may hold either or both, in that order.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from string import Template

from PIL import Image

from smooth_rt.plot import Curve, line_plot
from smooth_rt.writers import encode_png

__all__ = ["VARIANTS", "Edit", "Inversion", "Morph", "Page", "render"]

VARIANTS = {"base": "Base model", "smooth": "With the Smooth-LoRA"}
AFTER = ' class="after"'


@dataclass(frozen=True)
class Morph:
    """Frames of each variant, the L2 pixel distances between neighbours (one fewer than the frames) and the ISTD."""

    title: str
    caption: str
    frames: Mapping[str, Sequence[Image.Image]]
    distances: Mapping[str, Sequence[float]]
    istd: Mapping[str, float]


@dataclass(frozen=True)
class Inversion:
    """A real image, what each variant rebuilds from its inverted noise, and the PSNR in dB of each."""

    caption: str
    original: Image.Image
    rebuilt: Mapping[str, Image.Image]
    psnr: Mapping[str, float]


@dataclass(frozen=True)
class Edit:
    """A real image and what each variant makes of it under another prompt."""

    source_prompt: str
    prompt: str
    before: Image.Image
    after: Mapping[str, Image.Image]


@dataclass(frozen=True)
class Page:
    """What the page says. A section without content is left out.

    Args:
        lead: one or two sentences under the title.
        rows: the table of results, one mapping a row, all of the same columns.
        environment: versions and machine, name -> value.
        commands: what to type to see the same again.
    """

    title: str
    lead: str
    version: str
    morphs: Sequence[Morph] = ()
    inversions: Sequence[Inversion] = ()
    edits: Sequence[Edit] = ()
    rows: Sequence[Mapping[str, str]] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    commands: Sequence[str] = ()


def render(page: Page) -> str:
    """The page as one HTML document."""
    templates = resources.files("smooth_rt") / "templates"
    parts = [_morphs(page.morphs), _inversions(page.inversions), _edits(page.edits), _plots(page.morphs)]
    parts += [_table(page.rows), _environment(page.environment), _commands(page.commands)]
    return Template((templates / "report.html").read_text(encoding="utf-8")).substitute(
        title=escape(page.title),
        version=escape(page.version),
        lead=f'<p class="soft">{escape(page.lead)}</p>',
        style=(templates / "report.css").read_text(encoding="utf-8").strip(),
        script=(templates / "report.js").read_text(encoding="utf-8").strip(),
        sections="\n".join(part for part in parts if part),
    )


def _section(name: str, title: str, text: str, body: str) -> str:
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{escape(title)}</h2>\n'
        f'<p class="soft">{escape(text)}</p>\n{body}\n</section>'
    )


def _picture(image: Image.Image, alt: str, attributes: str = "") -> str:
    content = base64.b64encode(encode_png(image)).decode("ascii")
    width, height = image.size
    source = f"data:image/png;base64,{content}"
    return f'<img src="{source}" width="{width}" height="{height}" alt="{escape(alt)}"{attributes}>'


def _named(variant: str) -> str:
    return f'<span class="mark {variant}"></span><strong>{escape(VARIANTS[variant])}</strong>'


def _present(values: Mapping[str, object]) -> list[str]:
    return [variant for variant in VARIANTS if variant in values]


def _morphs(morphs: Sequence[Morph]) -> str:
    if not morphs:
        return ""
    text = (
        "Both ends are turned into noise, the noise is interpolated along the sphere, and every step is denoised. "
        "In a smooth latent space equal steps of the noise are equal steps of the picture."
    )
    return _section("morph", "Morph", text, "\n".join(_morph(morph) for morph in morphs))


def _morph(morph: Morph) -> str:
    variants = _present(morph.frames)
    last = len(morph.frames[variants[0]]) - 1
    screens, strips = [], []
    for variant in variants:
        frames = morph.frames[variant]
        alt = f"{morph.title}, {VARIANTS[variant].lower()}: the frame chosen by the slider"
        screens.append(
            f"<figure>{_picture(frames[0], alt, ' data-screen')}<figcaption>{_named(variant)}</figcaption></figure>"
        )
        aspect = frames[0].width / frames[0].height
        row = "".join(_picture(frame, f"frame {i + 1} of {last + 1}") for i, frame in enumerate(frames))
        strips.append(
            f'<div class="strip"><span class="name">{_named(variant)}</span>'
            f'<div class="row" style="--aspect:{aspect:.4f}">{row}</div></div>'
        )
    return (
        f'<div class="card" data-morph>\n<h3>{escape(morph.title)}</h3>\n<p class="soft">{escape(morph.caption)}</p>\n'
        f'<div class="pictures screens">{"".join(screens)}</div>\n'
        f'<div class="controls"><button type="button">Play</button>'
        f'<input type="range" min="0" max="{last}" value="0" step="1" aria-label="Frame of {escape(morph.title)}">'
        f"<output>1 of {last + 1}</output></div>\n{''.join(strips)}\n</div>"
    )


def _inversions(inversions: Sequence[Inversion]) -> str:
    if not inversions:
        return ""
    cards = []
    for inversion in inversions:
        original = _picture(inversion.original, f"original: {inversion.caption}")
        figures = [f"<figure>{original}<figcaption><strong>Original</strong></figcaption></figure>"]
        for variant in _present(inversion.rebuilt):
            image = _picture(inversion.rebuilt[variant], f"rebuilt, {VARIANTS[variant].lower()}")
            figures.append(
                f"<figure>{image}<figcaption>{_named(variant)}<br>PSNR {inversion.psnr[variant]:.2f} dB"
                "</figcaption></figure>"
            )
        cards.append(
            f'<div class="card">\n<h3>{escape(inversion.caption)}</h3>\n<div class="pictures">{"".join(figures)}</div>'
            "\n</div>"
        )
    text = (
        "A real image goes through the encoder and backwards through time to its noise; from that noise alone the "
        "image is made again. A higher PSNR is closer to the original."
    )
    return _section("inversion", "Inversion", text, "\n".join(cards))


def _edits(edits: Sequence[Edit]) -> str:
    if not edits:
        return ""
    cards = []
    for edit in edits:
        stages = []
        for variant in _present(edit.after):
            before = _picture(edit.before, f"before: {edit.source_prompt}")
            after = _picture(edit.after[variant], f"after, {VARIANTS[variant].lower()}: {edit.prompt}", AFTER)
            label = f"Share that shows the image before the edit, {VARIANTS[variant].lower()}"
            stages.append(
                f'<figure data-before-after><div class="before-after">{before}{after}</div>'
                f'<div class="controls"><input type="range" min="0" max="100" value="50" aria-label="{escape(label)}">'
                '</div><div class="ends"><span>before</span><span>after</span></div>'
                f"<figcaption>{_named(variant)}</figcaption></figure>"
            )
        title = f"“{edit.source_prompt}” → “{edit.prompt}”"
        cards.append(
            f'<div class="card">\n<h3>{escape(title)}</h3>\n<div class="edits">{"".join(stages)}</div>\n</div>'
        )
    text = "The image is inverted under its own prompt and denoised under another one. Move the slider to compare."
    return _section("edit", "Edit by prompt", text, "\n".join(cards))


def _plots(morphs: Sequence[Morph]) -> str:
    drawn = [morph for morph in morphs if any(len(values) > 1 for values in morph.distances.values())]
    if not drawn:
        return ""
    text = (
        "The L2 pixel distance between each frame and the next. ISTD is the standard deviation of these distances: "
        "the flatter the line, the smoother the morph."
    )
    cards = [f'<div class="card">\n<h3>{escape(morph.title)}</h3>\n{_plot(morph)}\n</div>' for morph in drawn]
    return _section("istd", "Steps between frames", text, "\n".join(cards))


def _plot(morph: Morph) -> str:
    curves = [
        Curve(variant, f"{variant}, ISTD {morph.istd[variant]:.2f}", VARIANTS[variant], list(morph.distances[variant]))
        for variant in _present(morph.distances)
    ]
    return line_plot(curves, lambda i: f"{i + 1}→{i + 2}")


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    columns = list(rows[0])
    numeric = {c for c in columns if all(row[c][:1].isdigit() or row[c][:1] in "-∞" for row in rows)}

    def cell(tag: str, column: str, text: str) -> str:
        attribute = ' class="number"' if column in numeric else ""
        return f"<{tag}{attribute}>{escape(text)}</{tag}>"

    head = "".join(cell("th", column, column) for column in columns)
    body = "".join("<tr>" + "".join(cell("td", c, row[c]) for c in columns) + "</tr>" for row in rows)
    table = f'<div class="card wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    text = (
        "What ran where, and how it went: seconds of each job without the building of engines, ISTD of each morph, "
        "PSNR of the inversion, and the PSNR of the worst image against the same seed on the first engine."
    )
    return _section("results", "Results", text, table)


def _environment(environment: Mapping[str, str]) -> str:
    if not environment:
        return ""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in environment.items())
    body = f'<div class="card"><dl>{items}</dl></div>'
    return _section("environment", "Environment", "Where this was computed.", body)


def _commands(commands: Sequence[str]) -> str:
    if not commands:
        return ""
    lines = escape("\n".join(commands))
    text = "Type this to see the same again."
    return _section("commands", "Commands", text, f'<pre tabindex="0"><code>{lines}</code></pre>')
