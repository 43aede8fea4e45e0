"""The page about a study or run: one file that needs nothing else, for a browser, a phone, paper."""
import base64
import html

from figures.gallery import area_lines, draw_all
from figures.style import image
from figures.table import table

STYLE = """
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1, h2 { line-height: 1.2; break-after: avoid; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; }
caption { text-align: left; padding-bottom: .5rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #999; text-align: right;
         font-variant-numeric: tabular-nums; white-space: nowrap; }
thead th { white-space: normal; vertical-align: bottom; }
th:first-child { text-align: left; }
figure { margin: 2rem 0; }
figure img { width: 100%; min-width: 38rem; height: auto; }
pre { overflow-x: auto; background: #f2f2f2; padding: .75rem; }
dt { font-weight: bold; }
@media print {
  body { max-width: none; font-size: 9pt; }
  table { font-size: 7pt; }
  th, td { padding: .1rem .25rem; white-space: normal; }
  figure img { min-width: 0; }
  figure, tr { break-inside: avoid; }
}
"""

# Counts the figures that a browser could draw: a test reads the count, a reader sees nothing of it.
SCRIPT = """
addEventListener("load", () => {
  const drawn = [...document.querySelectorAll("figure img")].filter(i => i.naturalWidth > 0);
  document.body.dataset.figures = drawn.length;
});
"""


def page(study):
    """The HTML of the report."""
    drawn, absent = draw_all(study)
    heading = html.escape(study.name)
    parts = [
        f"<h1>{heading}</h1>",
        f"<p>{html.escape(study.describe())}.</p>",
        items([f"Code version: {', '.join(study.code_versions) or 'not recorded'}"] +
              study.notes() + absent),
        "<h2>Results</h2>", results(study), meanings(study),
    ]
    if lines := area_lines(study, drawn):
        parts += ["<h2>The curves as one number</h2>", items(lines)]
    parts += ["<h2>Figures</h2>"] + [figure(each) for each in drawn]
    parts += ["<h2>Configuration</h2>"] + configurations(study)
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading}: Entrain</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def items(lines):
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def results(study):
    columns, rows = table(study)
    if not rows:
        return "<p>Not evaluated yet.</p>"
    head = "".join(f'<th scope="col">{html.escape(name)}</th>'
                   for name in ["setting", "seeds"] + [column.heading for column in columns])
    body = "\n".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{seeds}</td>' +
        "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, seeds, cells in rows)
    return ("<div class=\"wide\"><table><caption>Means over the seeds, on the validation text."
            f"</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>")


def meanings(study):
    columns, _ = table(study)
    return "<dl>" + "".join(f"<dt>{html.escape(column.heading)}</dt>"
                            f"<dd>{html.escape(column.meaning)}</dd>" for column in columns) + "</dl>"


def figure(drawn):
    data = base64.b64encode(image(drawn.figure, "svg")).decode()
    return (f'<figure id="{drawn.name}"><div class="wide"><img alt="{html.escape(drawn.title)}" '
            f'src="data:image/svg+xml;base64,{data}"></div>\n'
            f"<figcaption><strong>{html.escape(drawn.title)}.</strong> "
            f"{html.escape(drawn.meaning)}</figcaption></figure>")


def configurations(study):
    texts = ([("The study", study.yaml)] if study.yaml else []) + \
            [(run.name, run.config) for run in study.runs]
    return [f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(yaml)}</pre></details>"
            for name, yaml in texts]
