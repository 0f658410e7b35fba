"""What the release check does with the extra `report` alone: a page with a table and a chart, and the image of the chart.

python release_page.py PAGE.html CHART.png
"""

import sys
from pathlib import Path

from muonwire.pages import Cell, Column, Page, Section, Table, render_page, series_chart, write_png

points = [{"series": "muon", "x": step, "y": 1 / step} for step in range(1, 9)]
chart = series_chart(
    points, name="chart", title="Loss", how_to_read="Lower is better.", x_title="step", y_title="loss"
)
rows = tuple((Cell(text=str(point["x"])), Cell(text=f"{point['y']:.2f}")) for point in points)
table = Table(caption="Loss", columns=(Column(label="step"), Column(label="loss")), rows=rows)
section = Section(title="Loss", anchor="loss", blocks=(chart, table))
page, image = Path(sys.argv[1]), Path(sys.argv[2])
page.write_text(render_page(Page(title="Release", lead="A page.", sections=(section,))))
write_png(chart, image.parent).rename(image)
assert "vega" in page.read_text()
assert image.read_bytes().startswith(b"\x89PNG")
